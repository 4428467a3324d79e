// Charts as inline SVG, drawn in the pixels of their place. Each has a text for screen readers and a table with its
// numbers.

const MARGIN = { left: 56, right: 16, top: 12, bottom: 28 };
const TIME_STEPS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];

const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from || 1)) * (end - start);
const points = (pairs) => pairs.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

function figure(title, label, drawing, table, legend) {
  return el(
    "figure",
    { class: "chart" },
    el("figcaption", {}, el("h3", { text: title }), legend),
    el("div", { class: "drawing", role: "img", "aria-label": label }, drawing),
    table,
  );
}

function numbersTable(title, head, rows) {
  return el(
    "details",
    { class: "numbers" },
    el("summary", { text: title }),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "group", "aria-label": title },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map((name) => el("th", { scope: "col", text: name })),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map(([name, ...cells]) =>
            el(
              "tr",
              {},
              el("th", { scope: "row", dir: "auto" }, name),
              cells.map((cell) => el("td", {}, cell)),
            ),
          ),
        ),
      ),
    ),
  );
}

function legendOf(items) {
  return el(
    "ul",
    { class: "legend" },
    items.map(([css, name]) => el("li", {}, el("i", { class: css }), name)),
  );
}

// Round steps of an axis from 0 to `most`.
function ticks(most, about = 4) {
  const raw = most / about || 1,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

function timeAxis(from, to, x, y, width) {
  const about = Math.max(3, Math.floor(width / 120));
  const step = TIME_STEPS.find((each) => (to - from) / each <= about) ?? Math.ceil((to - from) / about);
  const offset = new Date(from * 1000).getTimezoneOffset() * 60;
  const nodes = [];
  let day = "";
  for (let at = Math.ceil((from - offset) / step) * step + offset; at <= to && nodes.length < 60; at += step) {
    const label = moment(
      step >= 86400 || new Date(at * 1000).toDateString() !== day ? DATE : step < 60 ? SECONDS : CLOCK,
      at,
    );
    day = new Date(at * 1000).toDateString();
    const edge = x(at) > width - 50 ? "end" : x(at) < 90 ? "start" : "middle";
    nodes.push(
      svg("line", { class: "tick", x1: x(at), x2: x(at), y1: MARGIN.top, y2: y }),
      svg("text", { x: x(at), y: y + 18, "text-anchor": edge, text: label }),
    );
  }
  return nodes;
}

function valueAxis(most, y, width) {
  return ticks(most).flatMap((value) => [
    svg("line", { class: "tick", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
    svg("text", {
      x: MARGIN.left - 8,
      y: y(value) + 4,
      "text-anchor": "end",
      text: value >= 10000 ? `${significant(value / 1000, 3)}k` : significant(value, 3),
    }),
  ]);
}

function canvas(width, height, ...children) {
  return svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" },
    children,
  );
}

// Committed and quarantined samples over time; the dashed line leads to the estimated end.
function progressChart(report, width) {
  const data = report.progress,
    last = data.at(-1),
    total = report.totals.samples,
    height = 240;
  const end = report.running && report.etaSeconds ? last.at + report.etaSeconds : null;
  // An end that is very far away would press the measured part into a corner.
  const to = end ? Math.min(end, last.at + 3 * (last.at - data[0].at)) : last.at;
  const x = scale(data[0].at, to, MARGIN.left, width - MARGIN.right),
    y = scale(0, total, height - MARGIN.bottom, MARGIN.top);
  const area = (top, bottom) =>
    points([...data.map((p) => [x(p.at), y(top(p))]), ...[...data].reverse().map((p) => [x(p.at), y(bottom(p))])]);
  const done = (p) => p.committed + p.quarantined;
  const reached = end ? done(last) + (total - done(last)) * ((to - last.at) / (end - last.at)) : 0;
  const drawing = canvas(
    width,
    height,
    valueAxis(total, y, width),
    timeAxis(data[0].at, to, x, height - MARGIN.bottom, width),
    svg("polygon", {
      class: "fill-good",
      points: area(
        (p) => p.committed,
        () => 0,
      ),
    }),
    svg("polygon", { class: "fill-bad", points: area(done, (p) => p.committed) }),
    end && svg("line", { class: "projection", x1: x(last.at), y1: y(done(last)), x2: x(to), y2: y(reached) }),
  );
  const label =
    `${integer(last.committed)} of ${plural(total, "sample")} are committed and ${integer(last.quarantined)} quarantined at ${moment(DATE, last.at)}.` +
    (end ? ` The estimated end is ${moment(DATE, end)}.` : "");
  const every = Math.max(1, Math.ceil(data.length / 40));
  const rows = data
    .filter((_, i) => i % every === 0 || i === data.length - 1)
    .map((p) => [stamp(p.at), integer(p.committed), integer(p.quarantined), integer(p.pending)]);
  return figure(
    "Progress",
    label,
    drawing,
    numbersTable("Progress as a table", ["Time", "Committed", "Quarantined", "Pending"], rows),
    legendOf([
      ["swatch-good", "committed"],
      ["swatch-bad", "quarantined"],
      ...(end ? [["swatch-line", `estimated end ${moment(DATE, end)}`]] : []),
    ]),
  );
}

// Finished samples per hour, in equal slices of the time.
function throughputChart(report, width) {
  const data = report.progress,
    from = data[0].at,
    to = data.at(-1).at,
    height = 180;
  const slices = Math.max(1, Math.min(48, Math.floor(width / 14), data.length - 1)),
    length = (to - from) / slices;
  const doneAt = (at) => {
    const after = data.findIndex((p) => p.at >= at);
    if (after <= 0) return after < 0 ? done(data.at(-1)) : done(data[0]);
    const [a, b] = [data[after - 1], data[after]];
    return scale(a.at, b.at, done(a), done(b))(at);
  };
  const done = (p) => p.committed + p.quarantined;
  const rates = Array.from({ length: slices }, (_, i) =>
    Math.max(0, ((doneAt(from + (i + 1) * length) - doneAt(from + i * length)) * 3600) / length),
  );
  const most = Math.max(...rates, 1e-9),
    mean = ((done(data.at(-1)) - done(data[0])) * 3600) / (to - from);
  const x = scale(from, to, MARGIN.left, width - MARGIN.right),
    y = scale(0, most, height - MARGIN.bottom, MARGIN.top);
  const bars = rates.map((rate, i) =>
    svg(
      "rect",
      {
        class: "fill-accent",
        x: x(from + i * length) + 1,
        width: Math.max(1, x(from + length) - x(from) - 2),
        y: y(rate),
        height: Math.max(0, y(0) - y(rate)),
      },
      svg("title", { text: `${moment(DATE, from + i * length)}: ${significant(rate, 3)} per hour` }),
    ),
  );
  const drawing = canvas(
    width,
    height,
    valueAxis(most, y, width),
    timeAxis(from, to, x, height - MARGIN.bottom, width),
    bars,
  );
  const rows = rates.map((rate, i) => [stamp(from + i * length), significant(rate, 3)]);
  return figure(
    "Samples per hour",
    `On average ${significant(mean, 3)} samples per hour, at most ${significant(most, 3)}.`,
    drawing,
    numbersTable("Samples per hour as a table", ["From", "Per hour"], rows),
    el("p", { class: "soft", text: `${significant(mean, 3)} on average` }),
  );
}
