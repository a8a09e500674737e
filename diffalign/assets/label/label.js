"use strict";
// Texts of prompts and names go into the page as text alone, never as HTML: they may come from anyone.

const at = (id) => document.getElementById(id);
const PLAY = "qwer";
let rater = "", now = null, done = 0, picked = [], since = 0, busy = false, again = null;

function made(tag, classes, text) {
  const element = document.createElement(tag);
  element.className = classes || "";
  if (text !== undefined) element.textContent = text;
  return element;
}

async function ask(path, body) {
  const how = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(path, how);
  const said = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.detail), { status: answer.status });
  return said;
}

// One request at a time: a key that is pressed twice is one answer. One that failed can be sent again; the server takes it once.
async function send(path, body) {
  if (busy) return;
  busy = true;
  again = () => send(path, body);
  try {
    show(await ask(path, body));
    at("trouble").hidden = true;
    again = null;
  } catch (error) {
    if (error.status === 409) { again = refresh; }
    const what = error.status ? error.message : "The server does not answer. What you answered before is kept.";
    at("trouble").firstElementChild.textContent = what;
    at("trouble").hidden = false;
  } finally {
    busy = false;
  }
}

const refresh = () => send("/state?rater=" + encodeURIComponent(rater));

function show(state) {
  now = state.comparison;
  done = state.done;
  picked = [];
  since = performance.now();
  at("bar").max = state.total;
  at("bar").value = state.done;
  at("count").textContent = `${state.done} of ${state.total}` + (state.skipped ? `, ${state.skipped} skipped` : "");
  at("leave").textContent = state.rater;
  at("undo").disabled = done === 0;
  at("tie").disabled = at("skip").disabled = now === null;
  at("stage").replaceChildren();
  at("about").replaceChildren();
  at("about").hidden = at("transcript").hidden = true;
  if (now === null) end(state);
  else compare(state);
  fetch("/agreement").then((answer) => answer.json()).then(agree, () => {});
}

function end(state) {
  at("prompt").textContent = "All done. Thank you!";
  at("prompt").className = "";
  at("stage").className = "";
  const judged = state.done - state.skipped, what = `You judged ${judged} comparison${judged === 1 ? "" : "s"}` + (state.skipped ? ` and skipped ${state.skipped}.` : ".");
  at("stage").append(made("p", "end", what + " You may close this page; Undo takes back the last answer."));
}

function compare(state) {
  at("prompt").textContent = now.prompt;
  at("prompt").classList.toggle("long", now.prompt.length > 120);
  if (now.transcript !== null) {
    at("transcript").textContent = `“${now.transcript}”`;
    at("transcript").hidden = false;
  }
  for (const [name, number] of [["Source", now.source], ["Mask", now.mask]]) {
    if (number === null) continue;
    const figure = made("figure");
    figure.append(picture(number, name), made("figcaption", "", name));
    at("about").append(figure);
    at("about").hidden = false;
  }
  at("tie").firstElementChild.textContent = now.media.length > 2 ? "Rest ties" : "Tie";
  at("stage").dataset.count = now.media.length;
  at("stage").className = now.kind === "sound" ? "sounds" : "";
  at("stage").append(...now.media.map((number, i) => (now.kind === "sound" ? heard(number, i) : seen(number, i))));
  if (now.kind === "picture") for (const number of state.then) new Image().src = `/media/${number}`;
}

// What is not there yet cannot be judged: a key that was pressed twice must not answer for the next comparison.
function came(medium) {
  medium.dataset.came = "1";
  const media = [...at("stage").querySelectorAll("img, audio")];
  at("stage").classList.toggle("ready", media.length > 0 && media.every((each) => each.dataset.came));
}

const ready = () => !busy && now !== null && at("stage").classList.contains("ready");

function picture(number, name) {
  const image = made("img");
  image.alt = name;
  image.draggable = false;
  image.addEventListener("load", () => {
    image.classList.toggle("small", image.naturalWidth <= 128);
    if (image.closest(".card")) at("stage").classList.toggle("wide", image.naturalWidth > 1.2 * image.naturalHeight);
    came(image);
  });
  image.addEventListener("error", () => { image.parentElement?.classList.add("broken"); came(image); });
  image.src = `/media/${number}`;
  return image;
}

function seen(number, i) {
  const card = made("button", "card picture");
  card.type = "button";
  card.append(picture(number, `Sample ${i + 1}`), made("span", "place", i + 1));
  card.addEventListener("click", () => pick(i));
  return card;
}

function heard(number, i) {
  const card = made("div", "card sound"), player = made("div", "player"), audio = made("audio");
  const play = made("button", "play", "▶"), slide = made("input"), time = made("span");
  play.type = "button";
  play.setAttribute("aria-label", `Play sample ${i + 1}`);
  Object.assign(slide, { type: "range", min: 0, max: 1, step: "any", value: 0, ariaLabel: `Place in sample ${i + 1}` });
  const told = () => {
    const whole = Number.isFinite(audio.duration) ? audio.duration : 0;
    slide.value = whole ? audio.currentTime / whole : 0;
    time.textContent = `${audio.currentTime.toFixed(1)} of ${whole.toFixed(1)} s`;
    play.textContent = audio.paused ? "▶" : "❚❚";
    card.classList.toggle("playing", !audio.paused);
  };
  for (const event of ["play", "pause", "ended", "timeupdate", "loadedmetadata"]) audio.addEventListener(event, told);
  audio.addEventListener("loadedmetadata", () => came(audio));
  audio.addEventListener("error", () => { card.classList.add("broken"); came(audio); });
  slide.addEventListener("input", () => { if (audio.duration) audio.currentTime = slide.value * audio.duration; });
  play.addEventListener("click", () => toggle(i));
  audio.preload = "auto";
  audio.src = `/media/${number}`;
  told();
  const choose = made("button", "choose");
  choose.type = "button";
  choose.append("Choose ", made("kbd", "", i + 1));
  choose.addEventListener("click", () => pick(i));
  const line = made("span", "time");
  line.append(time, " ", made("kbd", "", PLAY[i].toUpperCase()));
  player.append(audio, play, slide, line);
  card.append(made("span", "place", i + 1), player, choose);
  return card;
}

function toggle(i) {
  const players = [...at("stage").querySelectorAll("audio")];
  players.forEach((audio, j) => { if (j !== i) audio.pause(); });
  const audio = players[i];
  if (audio) audio.paused ? audio.play().catch(() => {}) : audio.pause();
}

// The best first; what is left over when one is left is the last. Picking a ranked one again takes it and those after it back.
function pick(i) {
  if (!ready() || i >= now.media.length) return;
  picked = picked.includes(i) ? picked.slice(0, picked.indexOf(i)) : [...picked, i];
  mark();
  if (picked.length === now.media.length - 1) answer(now.media.map((_, j) => (picked.includes(j) ? picked.indexOf(j) : picked.length)));
}

function mark() {
  at("undo").disabled = done === 0 && !picked.length;
  [...at("stage").children].forEach((card, j) => {
    card.classList.toggle("ranked", picked.includes(j));
    card.querySelector(".place").textContent = picked.includes(j) && now.media.length > 2 ? ["1st", "2nd", "3rd"][picked.indexOf(j)] : j + 1;
  });
}

function answer(ranks) {
  if (busy || now === null) return;
  send("/answer", { rater, comparison: now.id, ranks, seconds: Math.round(performance.now() - since) / 1000 });
}

const tie = () => ready() && answer(now.media.map((_, j) => (picked.includes(j) ? picked.indexOf(j) : picked.length)));
const skip = () => answer(null);

function undo() {
  if (busy) return;
  if (picked.length) {
    picked = picked.slice(0, -1);
    mark();
  } else if (!at("undo").disabled) send("/undo", { rater });
}

function agree(found) {
  if (!found.common) return void (at("agreement").textContent = "");
  const kappa = found.kappa === null ? "" : `, ${found.name} kappa ${found.kappa.toFixed(2)}`;
  at("agreement").textContent = `People agree on ${Math.round(100 * found.share)}% of ${found.common} common pair${found.common === 1 ? "" : "s"}${kappa}`;
}

document.addEventListener("keydown", (event) => {
  if (at("work").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase(), two = now !== null && now.media.length === 2;
  const sides = { arrowleft: 0, arrowright: 1 };
  if ("1234".includes(key)) pick(Number(key) - 1);
  else if (event.target.type === "range") return; // its arrows move in the sound
  else if (two && key in sides) pick(sides[key]);
  else if (key === "t" || key === "0" || (two && key === "arrowdown")) tie();
  else if (key === "s") skip();
  else if (key === "u" || key === "backspace") undo();
  else if (now?.kind === "sound" && PLAY.includes(key)) toggle(PLAY.indexOf(key));
  else return;
  event.preventDefault();
});

at("tie").addEventListener("click", tie);
at("skip").addEventListener("click", skip);
at("undo").addEventListener("click", undo);
at("retry").addEventListener("click", () => (again || refresh)());
at("leave").addEventListener("click", () => {
  at("work").hidden = true;
  at("who").hidden = false;
  at("name").select();
});

async function begin(name) {
  try {
    const state = await ask("/state?rater=" + encodeURIComponent(name));
    rater = state.rater;
    try { localStorage.setItem("diffalign-rater", rater); } catch { /* a browser that keeps nothing */ }
    at("who").hidden = true;
    at("work").hidden = false;
    document.activeElement?.blur(); // keys are for the comparison from here on
    show(state);
  } catch (error) {
    at("why").textContent = error.status ? error.message : "The server does not answer.";
    at("who").hidden = false;
  }
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  at("why").textContent = "";
  begin(at("name").value);
});

let last = "";
try { last = localStorage.getItem("diffalign-rater") || ""; } catch { /* as above */ }
at("name").value = last;
at("who").hidden = false;
at("name").focus();
