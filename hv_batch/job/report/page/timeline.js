// The timeline of workers: one line for each group or other worker, below the name of its stage.

const SPANS = new Map([
  ["work", "works"],
  ["start", "starts"],
  ["idle", "idle"],
  ["drain", "drains"],
  ["lost", "lost"],
]);
const LINE = 18,
  LABEL = 150; // pixels

function timelineChart(timeline, width) {
  const { from, to } = timeline,
    narrow = width < 560,
    label = narrow ? 90 : LABEL;
  const x = scale(from, to, label, width - MARGIN.right);
  const stages = new Map();
  for (const row of timeline.rows) stages.set(row.stage, [...(stages.get(row.stage) ?? []), row]);
  let y = MARGIN.top;
  const nodes = [];
  for (const [stage, rows] of stages) {
    nodes.push(svg("text", { class: "stage-name", x: 0, y: y + 12, text: `${humanize(stage)} (${rows.length})` }));
    y += LINE + 4;
    for (const row of rows) {
      nodes.push(
        svg("text", { class: "worker", x: 0, y: y + 12, text: shorten(row.worker, narrow ? 12 : 22) }),
        svg("line", { class: "tick", x1: label, x2: width - MARGIN.right, y1: y + 8, y2: y + 8 }),
        ...row.spans.map((span) => spanBar(row, span, x, y, from, to)),
      );
      y += LINE;
    }
    y += 8;
  }
  const drawing = canvas(width, y + MARGIN.bottom, timeAxis(from, to, x, y, width), nodes);
  return figure("Groups and nodes", timelineText(timeline), drawing, timelineTable(timeline), [
    legendOf([...SPANS].map(([kind, name]) => [`swatch-${kind}`, name])),
    timeline.left > 0 && el("p", { class: "soft", text: `and ${plural(timeline.left, "more worker")}` }),
  ]);
}

const shorten = (value, most) => (value.length > most ? `${value.slice(0, most - 1)}…` : value);

function spanBar(row, span, x, y, from, to) {
  const start = x(Math.max(from, span.from)),
    end = x(Math.min(to, span.to));
  const kind = SPANS.has(span.kind) ? span.kind : "idle",
    thin = kind === "idle" ? 4 : 0;
  const samples = span.samples ? `, ${plural(span.samples, "sample")}` : "";
  return svg(
    "rect",
    {
      class: `span-${kind}`,
      x: start,
      y: y + 1 + thin,
      width: Math.max(kind === "lost" ? 3 : 1, end - start),
      height: LINE - 4 - 2 * thin,
      rx: 1.5,
    },
    svg("title", {
      text: `${row.worker} on ${row.node}: ${SPANS.get(kind)} ${moment(CLOCK, span.from)} to ${moment(CLOCK, span.to)}${samples}`,
    }),
  );
}

function secondsOf(row, kind) {
  return row.spans.reduce((sum, span) => sum + (span.kind === kind ? span.to - span.from : 0), 0);
}

function timelineText(timeline) {
  const lost = timeline.rows.reduce((sum, row) => sum + row.spans.filter((span) => span.kind === "lost").length, 0);
  const nodes = new Set(timeline.rows.map((row) => row.node).filter(Boolean));
  return `${plural(timeline.rows.length, "worker")} on ${plural(nodes.size, "node")} from ${moment(DATE, timeline.from)} to ${moment(DATE, timeline.to)}; ${plural(lost, "loss", "losses")}. The table has the numbers.${timeline.left ? ` ${plural(timeline.left, "worker")} more.` : ""}`;
}

function timelineTable(timeline) {
  const rows = timeline.rows.map((row) => [
    row.worker,
    row.node,
    significant(row.gpus, 3),
    integer(row.spans.reduce((sum, s) => sum + s.samples, 0)),
    ...["work", "start", "idle", "drain"].map((kind) => duration(secondsOf(row, kind))),
    integer(row.spans.filter((s) => s.kind === "lost").length),
  ]);
  return numbersTable(
    "Groups and nodes as a table",
    ["Worker", "Node", "GPUs", "Samples", "Work", "Start", "Idle", "Drain", "Losses"],
    rows,
  );
}
