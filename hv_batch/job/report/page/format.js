// Numbers, durations and times as text.

const INTEGER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const SECONDS = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DATE = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const STAMP = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });

const integer = (value) => INTEGER.format(value);
const plural = (n, one, many = `${one}s`) => `${integer(n)} ${n === 1 ? one : many}`;
const significant = (value, digits) => new Intl.NumberFormat("en", { maximumSignificantDigits: digits }).format(value);
const percent = (share) => `${share > 0 && share < 0.1 ? significant(100 * share, 2) : INTEGER.format(100 * share)} %`;

// In decimal units, as object stores bill them.
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  while (bytes >= 1000 && units.length > 1) {
    bytes /= 1000;
    units.shift();
  }
  return `${significant(bytes, 3)} ${units[0]}`;
}

function duration(seconds) {
  if (seconds < 100) return `${significant(seconds, seconds < 10 ? 2 : 3)} s`;
  if (seconds < 6000) return `${significant(seconds / 60, 3)} min`;
  return `${INTEGER.format(seconds / 3600) === "0" ? 0 : significant(seconds / 3600, seconds < 360000 ? 3 : 6)} h`;
}

// A length of time in hours and minutes.
function hours(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes < 1) return "less than a minute";
  if (minutes < 60) return `${minutes} min`;
  return `${integer(Math.floor(minutes / 60))} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const moment = (format, at) => (Math.abs(at) < 8e12 ? format.format(new Date(at * 1000)) : "");
const stamp = (at) => moment(STAMP, at);

// "720x1280x129" (height, width, frames) for a reader.
function shapeLabel(shape) {
  const match = /^(\d+)x(\d+)x(\d+)$/.exec(shape);
  if (!match) return shape;
  return `${match[2]} × ${match[1]}, ${match[3] === "1" ? "image" : `${match[3]} frames`}`;
}

// Pairs of a stage and a value, in the order of the data path.
function inPathOrder(pairs) {
  const order = ["encode", "denoise", "decode"];
  const place = ([name]) => (order.includes(name) ? order.indexOf(name) : order.length);
  return [...pairs].sort((a, b) => place(a) - place(b));
}

function humanize(name) {
  const words = name.replace(/[_-]+/g, " ").trim();
  return words ? words[0].toUpperCase() + words.slice(1) : name;
}
