// Builds elements. Values become text nodes and attributes only; no markup is parsed.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// `attributes`: `text` sets the text, functions become listeners, false and null are left out, true is an empty
// attribute.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function debounce(action, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

function announce(message) {
  byId("live").textContent = message;
}

// A table of names and values. `facts`: pairs; a value may be a node.
function factTable(facts) {
  const rows = facts.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row", dir: "auto" }, name), el("td", { dir: "auto" }, value)),
  );
  return el("table", { class: "facts" }, el("tbody", {}, rows));
}

function copyButton(label, source) {
  const button = el("button", { type: "button", class: "button", text: label });
  button.addEventListener("click", async () => {
    const done = await copy(source());
    button.textContent = done ? "Copied" : "Select the text and copy it";
    announce(button.textContent);
    setTimeout(() => {
      button.textContent = label;
    }, 2000);
  });
  return button;
}

// The clipboard API needs https or this machine; a server of the local network has neither.
async function copy(value) {
  try {
    await navigator.clipboard.writeText(value);
    return true;
  } catch {
    const area = el("textarea", { class: "quiet", "aria-hidden": "true" });
    area.value = value;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// A text that is cut after some lines, with a button that shows all of it.
function clamped(value, css) {
  const paragraph = el("p", { class: `${css} clamp`, dir: "auto", text: value });
  const button = el("button", {
    type: "button",
    class: "more",
    "aria-expanded": "false",
    text: "Show all",
    hidden: true,
  });
  button.addEventListener("click", () => {
    const open = !paragraph.classList.toggle("clamp");
    button.textContent = open ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(open));
  });
  requestAnimationFrame(() => {
    button.hidden = paragraph.scrollHeight <= paragraph.clientHeight + 2;
  });
  return el("div", { class: "clamped" }, paragraph, button);
}
