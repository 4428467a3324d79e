// Quarantined samples, one block for each cause.

function drawFailures(report, href) {
  const root = byId("failures");
  const open = new Set([...root.querySelectorAll("details[open]")].map((each) => each.dataset.key));
  const focused = root.contains(document.activeElement);
  if (focused) return; // not while somebody reads in it
  if (!report.causes.length) {
    root.replaceChildren(
      el("p", {
        class: "soft",
        text: report.totals.quarantined
          ? "The report has no causes of the quarantined samples."
          : "No sample is quarantined.",
      }),
    );
    return;
  }
  const total = report.totals.quarantined;
  root.replaceChildren(
    el("p", {
      class: "lead",
      text:
        `${plural(total, "sample")} in ${plural(report.causes.length, "cause")}. ` +
        "Numbers and addresses in the messages are replaced by #.",
    }),
    ...report.causes.map((cause, i) => causeBlock(cause, i, total, open, href)),
  );
}

function causeBlock(cause, number, total, open, href) {
  const key = `${cause.failure} ${cause.message}`;
  const filter = new Map([["class", new Set([cause.failure])]]);
  const head = el(
    "summary",
    {},
    el("span", { class: "cause-count", text: integer(cause.count) }),
    el(
      "span",
      { class: "cause-text" },
      el("strong", { text: cause.failure }),
      el("span", { class: "clamp two", dir: "auto", text: cause.message }),
    ),
    el("span", { class: "share", text: total ? percent(cause.count / total) : "" }),
  );
  const examples = cause.examples.map((each) =>
    el(
      "li",
      {},
      each.key ? el("a", { href: href(each), dir: "auto", text: each.id || each.key }) : el("span", { text: each.id }),
      el("p", { class: "clamp two soft", dir: "auto", text: each.prompt }),
    ),
  );
  const block = el(
    "details",
    { class: "cause", open: open.has(key) },
    head,
    el(
      "div",
      { class: "cause-body" },
      el("h3", { text: "Examples" }),
      el("ul", { class: "examples" }, examples),
      cause.retry &&
        el(
          "div",
          { class: "row" },
          el("h3", { text: "Release them for a retry" }),
          copyButton("Copy", () => cause.retry),
        ),
      cause.retry && el("pre", { tabindex: "0", text: cause.retry }),
      traceback(cause.traceback, "Traceback"),
      el(
        "p",
        {},
        el("a", {
          href: address({ ...readAddress(), view: "videos", query: "", filters: filter, page: 1, sample: null }),
          text: `Show all samples of the class ${cause.failure}`,
        }),
      ),
    ),
  );
  block.dataset.key = key;
  return block;
}
