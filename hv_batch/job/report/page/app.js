// Puts the page together: reads the embedded report, follows the URL's hash, and fetches newer reports of a run that
// goes on.

const SCHEMA = "hv_batch/report/1";
const MIN_REFRESH_S = 5;
const VIEW_NAMES = { videos: "Videos", failures: "Failures", history: "What happened", run: "Run" };

const embedded = parseDocument(byId("report").textContent);
let report = readReport(embedded);
let state = readAddress();
let selected = null; // the filter and order that the results have

const parts = new Parts(list(embedded.first, 1000), () => partArrived());
const results = new Results(parts, () => resultsChanged());
const href = (sample) => address({ ...state, sample: sample.key, shard: sample.shard });
const grid = new Grid(byId("grid"), results, href);
const sampleView = new SampleView(results, parts, (sample, closed) =>
  navigate({ sample: sample?.key ?? null, shard: sample?.shard ?? null }, closed),
);

let moveToTop = false;

function navigate(changes, closed = null, replace = false) {
  // A search that is still being typed counts, too.
  state = { ...state, query: byId("query").value, ...changes };
  const url = address(state);
  if (replace) history.replaceState(null, "", url);
  else history.pushState(null, "", url);
  follow();
  if (closed) returnFocus(closed);
}

// After the dialog, the focus goes back to the card of its sample.
function returnFocus(sample) {
  if (state.view !== "videos") return;
  const at = results.items ? results.items.findIndex((each) => each.key === sample.key) : sample.at;
  if (at !== undefined && at >= grid.from && at < grid.to) grid.focusCard(at);
}

// Bring the page into the state of the address.
function follow() {
  for (const view of VIEWS) byId(`view-${view}`).hidden = view !== state.view;
  drawViews();
  if (byId("query").value.trim() !== state.query.trim()) byId("query").value = state.query;
  byId("sort").value = state.sort;
  drawScopes();
  drawFilters(report, state, choose);
  drawChips(state, choose, () => navigate({ query: "", filters: new Map(), page: 1 }));
  const wanted = address({ ...state, view: "videos", sample: null, page: 1 });
  if (wanted !== selected) {
    moveToTop = selected !== null;
    selected = wanted;
    results.select(report, state);
  } else if (grid.page !== state.page) {
    moveToTop = true;
    resultsChanged();
  }
  if (state.view === "videos") grid.layout();
  if (state.view === "failures") drawFailures(report, href);
  if (state.view === "history") drawHistory(report);
  sampleView.open(state.sample, state.shard, report);
}

function drawViews() {
  const focused = byId("views").contains(document.activeElement) ? document.activeElement.id : null;
  byId("views").replaceChildren(
    ...VIEWS.map((view) =>
      el(
        "a",
        {
          id: `to-${view}`,
          href: address({ ...state, view, sample: null }),
          "aria-current": view === state.view ? "page" : null,
        },
        VIEW_NAMES[view],
        view === "failures" &&
          report.totals.quarantined > 0 &&
          el("span", { class: "n", text: integer(report.totals.quarantined) }),
      ),
    ),
  );
  if (focused) byId(focused)?.focus();
  // On a narrow screen the views do not fit beside each other.
  const views = byId("views"),
    current = byId(`to-${state.view}`);
  if (views.scrollWidth > views.clientWidth)
    views.scrollLeft = current.offsetLeft - (views.clientWidth - current.offsetWidth) / 2;
}

function choose(facet, value, on) {
  const filters = new Map([...state.filters].map(([name, chosen]) => [name, new Set(chosen)]));
  const chosen = filters.get(facet) ?? new Set();
  chosen[on ? "add" : "delete"](value);
  if (chosen.size) filters.set(facet, chosen);
  else filters.delete(facet);
  navigate({ filters, page: 1 });
}

// In a run of more than 100,000 samples, a search covers one slice.
function drawScopes() {
  const scopes = results.scopes;
  byId("scope-label").hidden = scopes.length < 2;
  byId("scope").replaceChildren(
    ...scopes.map((scope, i) =>
      el("option", {
        value: i + 1,
        selected: i + 1 === state.scope,
        text: `samples ${integer(scope.start + 1)} to ${integer(scope.start + scope.samples)}`,
      }),
    ),
  );
}

function partArrived() {
  if (!results.items) grid.paint();
}

function resultsChanged() {
  grid.update(state.page, moveToTop);
  if (moveToTop && state.view === "videos") {
    const top = byId("view-videos").getBoundingClientRect().top - byId("views").parentElement.offsetHeight;
    if (top < 0) scrollBy(0, top);
  }
  moveToTop = false;
  drawShown();
  drawPager();
}

const announceShown = debounce(() => announce(byId("shown").textContent), 600);

function drawShown() {
  const all = parts.samples,
    found = results.length;
  let words = results.items ? `${integer(found)} of ${plural(all, "sample")}` : plural(all, "sample");
  if (results.items && results.scopes.length > 1)
    words += `, searched ${byId("scope").selectedOptions[0]?.textContent ?? ""}`;
  if (results.progress)
    words += `, reading shard ${integer(results.progress[0] + 1)} of ${integer(results.progress[1])}`;
  else if (results.items && !found) words = "No sample matches";
  if (byId("shown").textContent === words) return;
  byId("shown").textContent = words;
  if (results.items && !results.progress) announceShown();
}

function drawPager() {
  const pager = byId("pager"),
    last = Math.ceil(results.length / PAGE);
  pager.hidden = last < 2;
  if (pager.hidden) return;
  const go = (page) =>
    el("button", {
      type: "button",
      class: "button",
      disabled: page < 1 || page > last,
      click: () => navigate({ page }),
      text: page < grid.page ? "Previous" : "Next",
    });
  pager.replaceChildren(
    go(grid.page - 1),
    el("span", { text: `Samples ${integer(grid.from + 1)} to ${integer(grid.to)} of ${integer(results.length)}` }),
    go(grid.page + 1),
  );
}

function drawNotice() {
  const missing = report.samples - parts.samples,
    notice = byId("notice");
  notice.hidden = canFetch || missing <= 0;
  if (!notice.hidden)
    notice.replaceChildren(
      el("strong", { text: `The first ${integer(parts.samples)} of ${plural(report.samples, "sample")}. ` }),
      "A page that was opened from a disk cannot read further files. ",
      serveHint(),
    );
}

// A run that goes on writes a new report every few minutes. Scroll position, filter, focus and playing videos stay.
async function refresh() {
  if (document.hidden) return schedule();
  try {
    const raw = await fetchDocument("report.json");
    if (!isObject(raw) || raw.schema !== SCHEMA) throw new Error("it is no report");
    const newer = readReport(raw);
    if (newer.generatedAt !== report.generatedAt) take(newer);
  } catch {
    byId("pill").textContent = "Running; the last refresh failed";
  }
  return schedule();
}

function take(newer) {
  const done = newer.totals.committed - report.totals.committed;
  report = newer;
  sampleView.report = report;
  parts.update(report);
  drawHeader(report);
  drawViews();
  drawScopes();
  drawFilters(report, state, choose);
  results.select(report, state, true);
  if (state.view === "failures") drawFailures(report, href);
  if (state.view === "history") drawHistory(report);
  drawRun(report);
  announce(
    `Updated: ${integer(report.totals.committed)} of ${plural(report.totals.samples, "sample")} committed` +
      (done > 0 ? `, ${integer(done)} new.` : "."),
  );
}

function schedule() {
  if (canFetch && report.running && report.refreshSeconds)
    setTimeout(refresh, 1000 * Math.max(MIN_REFRESH_S, report.refreshSeconds));
}

function start() {
  parts.update(report);
  grid.videos = parts.videosOfAll();
  byId("sort").replaceChildren(...[...SORTS].map(([name, title]) => el("option", { value: name, text: title })));
  byId("query").addEventListener(
    "input",
    debounce(() => navigate({ query: byId("query").value, page: 1 }, null, true), 250),
  );
  byId("sort").addEventListener("change", () => navigate({ sort: byId("sort").value, page: 1 }));
  byId("scope").addEventListener("change", () => navigate({ scope: Number(byId("scope").value), page: 1 }));
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  addEventListener("hashchange", () => {
    state = readAddress();
    follow();
  });
  addEventListener(
    "resize",
    debounce(() => state.view === "history" && drawHistory(report), 200),
  );
  drawHeader(report);
  drawNotice();
  drawRun(report);
  follow();
  schedule();
}

start();
