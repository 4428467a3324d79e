// Tables with small drawings: the spread of stage times, and GPU-hours by use.

// Uses with a colour of their own; all others are losses.
const USES = new Set(["encode", "denoise", "decode", "start_up", "idle", "drain"]);

// Stage times of one shape: a box from the 10th to the 90th percentile, a line at the median, a dot at the mean, and a
// whisker to the largest.
function spreadTable(shape, stages) {
  const most = Math.max(...[...stages.values()].map((spread) => spread.max), 1e-9),
    width = 260,
    height = 22;
  const x = scale(0, most, 4, width - 4);
  const rows = inPathOrder([...stages]).map(([stage, s]) => {
    const box = canvas(
      width,
      height,
      svg("line", { class: "whisker", x1: x(s.p90), x2: x(s.max), y1: 11, y2: 11 }),
      svg("line", { class: "whisker", x1: x(s.max), x2: x(s.max), y1: 6, y2: 16 }),
      svg("rect", { class: "box", x: x(s.p10), y: 4, width: Math.max(2, x(s.p90) - x(s.p10)), height: 14, rx: 2 }),
      svg("line", { class: "median", x1: x(s.p50), x2: x(s.p50), y1: 3, y2: 19 }),
      svg("circle", { class: "mean", cx: x(s.mean), cy: 11, r: 2.5 }),
    );
    return el(
      "tr",
      {},
      el("th", { scope: "row", dir: "auto", text: humanize(stage) }),
      el("td", { class: "plot" }, box),
      [s.p10, s.p50, s.p90, s.max, s.mean].map((value) => el("td", { class: "n", text: duration(value) })),
      el("td", { class: "n", text: integer(s.count) }),
    );
  });
  const head = ["Stage", "Spread", "10 %", "Median", "90 %", "Longest", "Mean", "Samples"];
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": `Stage times of ${shapeLabel(shape)}` },
    el(
      "table",
      { class: "spread" },
      el("caption", { dir: "auto", text: shapeLabel(shape) }),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((name, i) => el("th", { scope: "col", class: i > 1 ? "n" : null, text: name })),
        ),
      ),
      el("tbody", {}, rows),
    ),
  );
}

// GPU-hours by use and loss, with their cost.
function gpuTable(totals) {
  const uses = [...totals.gpuSeconds].filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1]);
  const all = uses.reduce((sum, [, seconds]) => sum + seconds, 0);
  const bar = el(
    "div",
    { class: "stack", "aria-hidden": "true" },
    uses.map(([use, seconds]) => {
      const part = el("i", { class: USES.has(use) ? `use-${use}` : "use-lost" });
      part.style.flexGrow = String(seconds / all);
      return part;
    }),
  );
  const cost = (seconds) => (totals.price === null ? [] : [significant((seconds / 3600) * totals.price, 4)]);
  const rows = uses.map(([use, seconds]) => [
    el("span", {}, el("i", { class: `swatch ${USES.has(use) ? `use-${use}` : "use-lost"}` }), humanize(use)),
    ...[significant(seconds / 3600, 4), percent(seconds / all), ...cost(seconds)],
  ]);
  rows.push(["Total", significant(all / 3600, 4), "100 %", ...cost(all)]);
  const head = [
    "Use",
    "GPU-hours",
    "Share",
    ...(totals.price === null ? [] : [`Cost at ${significant(totals.price, 6)} per GPU-hour`]),
  ];
  return el(
    "section",
    { class: "chart" },
    el("h3", { text: "GPU-hours by use" }),
    bar,
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "uses" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map((name, i) => el("th", { scope: "col", class: i ? "n" : null, text: name })),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map(([name, ...cells]) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, name),
              cells.map((cell) => el("td", { class: "n", text: cell })),
            ),
          ),
        ),
      ),
    ),
  );
}
