// The header of the page, and the views of what happened and of the run itself.

const RUN_TITLES = { url: "Manifest", gpu: "GPU", licence_id: "Licence" };

function pillOf(report) {
  const { pending, quarantined, withdrawn } = report.totals;
  if (report.running) return ["running", "Running"];
  if (pending) return ["waiting", `${integer(pending)} pending, no driver`];
  if (quarantined) return ["quarantined", `Finished, ${integer(quarantined)} quarantined`];
  if (withdrawn) return ["committed", `Finished, ${integer(withdrawn)} withdrawn`];
  return ["committed", "All committed"];
}

function drawHeader(report) {
  const { totals } = report;
  byId("name").textContent = report.name || "Report";
  document.title = `${report.running ? `${percent(totals.samples ? totals.committed / totals.samples : 0)} · ` : ""}${report.name || "Report"} - hv_batch`;
  const [css, words] = pillOf(report);
  byId("pill").className = `pill ${css}`;
  byId("pill").textContent = words;
  byId("over").textContent =
    `${plural(totals.samples, "sample")} in ${plural(report.shards.length, "shard")} · as of ${stamp(report.generatedAt)}`;
  const bar = byId("bar"),
    parts = ["committed", "quarantined", "withdrawn"];
  bar.setAttribute(
    "aria-label",
    [...parts, "pending"]
      .filter((state) => totals[state])
      .map((state) => `${integer(totals[state])} ${state}`)
      .join(", ") || "no samples",
  );
  bar.replaceChildren(
    ...parts
      .filter((state) => totals[state])
      .map((state) => {
        const part = el("i", { class: state });
        part.style.flexBasis = `${(100 * totals[state]) / Math.max(1, totals.samples)}%`;
        return part;
      }),
  );
  byId("tiles").replaceChildren(
    ...tilesOf(report).map(([name, value, note]) =>
      el("div", { class: "tile" }, el("dt", { text: name }), el("dd", {}, value, note && el("small", { text: note }))),
    ),
  );
}

function tilesOf(report) {
  const { totals } = report,
    gpu = [...totals.gpuSeconds.values()].reduce((sum, seconds) => sum + seconds, 0);
  const tiles = [
    ["Committed", integer(totals.committed), totals.samples ? percent(totals.committed / totals.samples) : ""],
  ];
  if (totals.quarantined)
    tiles.push(["Quarantined", integer(totals.quarantined), plural(report.causes.length, "cause")]);
  if (totals.pending) tiles.push(["Pending", integer(totals.pending)]);
  if (totals.withdrawn) tiles.push(["Withdrawn", integer(totals.withdrawn)]);
  if (report.running && report.etaSeconds !== null)
    tiles.push([
      "Time left",
      hours(report.etaSeconds),
      `until ${moment(DATE, report.generatedAt + report.etaSeconds)}`,
    ]);
  tiles.push(
    ["Footage", duration(totals.media.seconds), plural(totals.media.frames, "frame")],
    ["Media", size(totals.media.bytes)],
  );
  if (totals.wallSeconds) tiles.push(["Wall time", hours(totals.wallSeconds)]);
  if (gpu)
    tiles.push([
      "GPU-hours",
      significant(gpu / 3600, 4),
      totals.price !== null ? `cost ${significant((gpu / 3600) * totals.price, 4)}` : "",
    ]);
  return tiles;
}

function drawHistory(report) {
  const root = byId("history"),
    width = Math.max(280, root.clientWidth - 2);
  const open = new Set([...root.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
  const focused = root.contains(document.activeElement) ? document.activeElement.textContent : null;
  const enough = report.progress.length > 1 && report.progress.at(-1).at > report.progress[0].at;
  const inner = width - 42;
  const blocks = [
    enough && progressChart(report, inner),
    enough && throughputChart(report, inner),
    report.timeline && timelineChart(report.timeline, inner),
    report.stages.size > 0 &&
      el(
        "section",
        { class: "chart" },
        el("h3", { text: "Time of a sample by stage and size" }),
        el("p", {
          class: "soft",
          text: "The box reaches from the 10th to the 90th percentile, the line in it is the median, the dot the mean; the whisker ends at the longest.",
        }),
        [...report.stages].map(([shape, stages]) => spreadTable(shape, stages)),
      ),
    report.totals.gpuSeconds.size > 0 && gpuTable(report.totals),
  ].filter(Boolean);
  if (!blocks.length) blocks.push(el("p", { class: "soft", text: "Nothing is recorded yet." }));
  root.replaceChildren(...blocks);
  for (const summary of root.querySelectorAll("summary")) {
    if (open.has(summary.textContent)) summary.parentElement.open = true;
    if (focused !== null && summary.textContent === focused) summary.focus({ preventScroll: true });
  }
}

function runTitle(name) {
  return RUN_TITLES[name] ?? humanize(name);
}

// The facts of the run: plain values in one table, lists of objects in a table of their own, long texts as paragraphs.
function drawRun(report) {
  const facts = [],
    sections = [];
  for (const [name, value] of entries(report.run, 60)) {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) continue;
    if (Array.isArray(value) && value.some(isObject)) sections.push(objectTable(runTitle(name), value));
    else if (isObject(value)) facts.push(...flatten(name, value).map(([title, shown]) => [runTitle(title), shown]));
    else if (typeof value === "string" && value.length > 120)
      sections.push(el("section", { class: "chart" }, el("h3", { text: runTitle(name) }), clamped(value, "long")));
    else
      facts.push([
        runTitle(name),
        Array.isArray(value)
          ? list(value, 20)
              .map((each) => text(String(each), 300))
              .join(", ")
          : typeof value === "number" && name !== "seed"
            ? integer(value)
            : String(value),
      ]);
  }
  byId("run").replaceChildren(
    el("section", { class: "chart" }, el("h3", { class: "quiet", text: "Facts" }), factTable(facts)),
    ...sections,
  );
  byId("footer").replaceChildren(
    `Written by hv_batch · ${stamp(report.generatedAt)}`,
    ...(report.run.licence
      ? [
          " · ",
          el("a", { href: address({ ...readAddress(), view: "run", sample: null }), text: "licence of the videos" }),
        ]
      : []),
  );
}

function objectTable(title, rows) {
  const names = [
    ...new Set(
      rows
        .slice(0, 50)
        .filter(isObject)
        .flatMap((row) => Object.keys(row)),
    ),
  ].slice(0, 10);
  const cell = (value) =>
    value === null || value === undefined
      ? ""
      : typeof value === "object"
        ? JSON.stringify(value).slice(0, 500)
        : String(value).slice(0, 500);
  return el(
    "section",
    { class: "chart" },
    el("h3", { text: title }),
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
            names.map((name) => el("th", { scope: "col", text: humanize(name) })),
          ),
        ),
        el(
          "tbody",
          {},
          rows
            .slice(0, 50)
            .filter(isObject)
            .map((row) =>
              el(
                "tr",
                {},
                names.map((name) => el("td", { dir: "auto", text: cell(row[name]) })),
              ),
            ),
        ),
      ),
    ),
  );
}
