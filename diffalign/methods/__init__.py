"""Methods: one file each, a frozen dataclass that yields losses. Found by name, imported when asked for."""
