"use strict";
// Draws the charts of the page's data, and moves the pictures. No library, no network.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  document.documentElement.classList.add("js");

  const element = (name, attributes, parent, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  // --- pictures through the training ---
  const slider = document.getElementById("moment");
  if (slider) {
    const moments = [...document.querySelectorAll(".moment")], said = document.getElementById("moment-said");
    const show = () => {
      moments.forEach((moment, i) => {
        moment.hidden = i !== +slider.value;
        if (moment.hidden) moment.querySelectorAll("audio").forEach((sound) => sound.pause());
      });
      said.textContent = moments[+slider.value].dataset.said;
      slider.setAttribute("aria-valuetext", said.textContent);
    };
    slider.addEventListener("input", show);
    slider.value = moments.length - 1; // also where the browser has kept another one
    show();
  }

  // --- charts ---
  const holder = document.getElementById("charts");
  if (!holder) return;
  const data = JSON.parse(document.getElementById("charts-data").textContent);
  const several = data.names.length > 1;
  const colour = (run) => `c${run % 8}${run >= 8 ? " dashed" : ""}`;
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9 || size < 1e-3) return (+value.toPrecision(3)).toExponential().replace("e+", "e");
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    return `${+value.toPrecision(4)}`;
  };
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  };
  // the mean of a window around each point, an eighth of the line wide: what a noisy curve does on the whole
  const smooth = (y) => {
    const half = Math.max(1, Math.floor(y.length / 16));
    return y.map((value, i) => {
      if (value === null) return null;
      const near = y.slice(Math.max(0, i - half), i + half + 1).filter((other) => other !== null);
      return near.reduce((sum, other) => sum + other, 0) / near.length;
    });
  };
  // lines are broken where a value is missing
  const path = (points) => {
    let text = "", pen = false;
    for (const [x, y] of points) {
      if (x === null || y === null) { pen = false; continue; }
      text += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = true;
    }
    return text;
  };

  const axis = () => document.querySelector("input[name=axis]:checked").value;
  const smoothed = document.getElementById("smooth");

  const draw = (chart, svg, at) => {
    const key = axis(), width = Math.max(svg.clientWidth, 120), height = 190, left = 48, right = 8, top = 8, bottom = 22;
    const lines = chart.lines.map((line) => ({ ...line, x: data.tracks[line.track].x[key] }))
      .filter((line) => line.x.some((x) => x !== null));
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const of = (name) => lines.flatMap((line) => (line[name] || []).filter((value) => value !== null));
    const xs = of("x"), ys = [...of("y"), ...of("low"), ...of("high"), ...of("limit")];
    const empty = !xs.length || !ys.length;
    const label = (empty ? [] : lines).map((line) => {
      const known = line.y.filter((value) => value !== null);
      return `${several ? `${data.names[line.run]} ` : ""}from ${short(known[0])} to ${short(known[known.length - 1])}`;
    });
    const unit = data.axes.find((each) => each.key === key).label;
    svg.setAttribute("aria-label", `${chart.title} against ${unit}: ${label.join("; ") || "nothing on this axis"}`);
    at.textContent = "";
    if (empty) { at.textContent = "Not logged against this axis."; return; }

    const xLow = Math.min(...xs, 0), xHigh = Math.max(...xs, xLow + 1e-9);
    let yLow = Math.min(...ys), yHigh = Math.max(...ys);
    const room = (yHigh - yLow) * 0.06 || Math.abs(yHigh) * 0.1 || 1;
    yLow -= room; yHigh += room;
    const px = (x) => x === null ? null : left + (x - xLow) / (xHigh - xLow) * (width - left - right);
    const py = (y) => y === null ? null : height - bottom - (y - yLow) / (yHigh - yLow) * (height - top - bottom);
    for (const y of ticks(yLow, yHigh, 6)) {
      element("line", { x1: left, x2: width - right, y1: py(y), y2: py(y), class: y === 0 ? "zero" : "grid" }, svg);
      element("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, svg, short(y));
    }
    for (const x of ticks(xLow, xHigh, Math.max(2, Math.floor(width / 64)))) {
      const anchor = px(x) > width - 20 ? "end" : "middle";
      element("text", { x: Math.min(px(x), width - 2), y: height - 6, "text-anchor": anchor }, svg, short(x));
    }
    for (const line of lines) {
      const points = line.x.map((x, i) => [px(x), py(line.y[i])]), rough = smoothed.checked && !line.dots && line.y.length > 8;
      if (line.limit && !several) element("path", { d: path(line.x.map((x, i) => [px(x), py(line.limit[i])])), class: "limit" }, svg);
      element("path", { d: path(points), class: `raw ${colour(line.run)}${rough ? " pale" : ""}`, fill: "none" }, svg);
      if (rough) {
        const calm = smooth(line.y);
        element("path", { d: path(line.x.map((x, i) => [px(x), py(calm[i])])), class: `mean ${colour(line.run)}` }, svg);
      }
      points.forEach(([x, y], i) => {
        if (x === null || y === null) return;
        if (line.low && line.low[i] !== null)
          element("line", { x1: x, x2: x, y1: py(line.low[i]), y2: py(line.high[i]), class: `whisker ${colour(line.run)}` }, svg);
        const alone = [i - 1, i + 1].every((near) => !points[near] || points[near][1] === null); // of a line there is nothing to see
        if (line.dots || alone) element("circle", { cx: x, cy: y, r: 3, class: colour(line.run) }, svg);
      });
    }
    const cursor = element("line", { y1: top, y2: height - bottom, x1: -9, x2: -9, class: "cursor" }, svg);
    const read = (pixel) => {
      const x = xLow + (pixel - left) / (width - left - right) * (xHigh - xLow);
      const near = lines.map((line) => {
        let best = -1;
        line.x.forEach((each, i) => {
          if (each !== null && line.y[i] !== null && (best < 0 || Math.abs(each - x) < Math.abs(line.x[best] - x))) best = i;
        });
        return best < 0 ? null : { line, x: line.x[best], y: line.y[best], i: best };
      }).filter(Boolean);
      if (!near.length) return;
      const closest = near.reduce((one, other) => Math.abs(other.x - x) < Math.abs(one.x - x) ? other : one);
      cursor.setAttribute("x1", px(closest.x));
      cursor.setAttribute("x2", px(closest.x));
      at.textContent = near.map(({ line, x: where, y, i }) => {
        const whose = several ? `${data.names[line.run]}: ` : "";
        const ends = line.low && line.low[i] !== null ? ` [${short(line.low[i])}, ${short(line.high[i])}]` : "";
        return `${whose}${short(y)}${ends} at ${short(where)}`;
      }).join("   ");
    };
    svg.onpointermove = (event) => read((event.clientX - svg.getBoundingClientRect().left) * width / (svg.clientWidth || width));
    svg.onpointerleave = () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); at.textContent = ""; };
  };

  const drawn = [...holder.querySelectorAll(".chart")].map((box) => {
    const svg = box.querySelector("svg");
    return () => draw(data.charts[+box.dataset.chart], svg, box.querySelector(".at"));
  });
  const all = () => drawn.forEach((redraw) => redraw());
  document.querySelectorAll("input[name=axis]").forEach((input) => input.addEventListener("change", all));
  smoothed.addEventListener("change", all);
  document.querySelectorAll("details").forEach((box) => box.addEventListener("toggle", all));
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(all); });
  all();
})();
