// The state of the page as the hash of its URL, so that a link shows the same view, filter, order and sample.
//
//     #view=videos&q=harbour&sort=slowest&f.state=committed&f.shape=720x1280x129&page=2&sample=KEY&shard=17

const VIEWS = ["videos", "failures", "history", "run"];
const SORTS = new Map([
  ["plan", "Order of the manifest"],
  ["slowest", "Slowest first"],
  ["fastest", "Fastest first"],
  ["largest", "Largest file first"],
  ["id", "Id"],
]);

function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d{1,9}$/.test(values.get(name) ?? "") ? Number(values.get(name)) : null);
  const state = {
    view: VIEWS.includes(values.get("view")) ? values.get("view") : "videos",
    query: (values.get("q") ?? "").slice(0, 200),
    sort: SORTS.has(values.get("sort")) ? values.get("sort") : "plan",
    filters: new Map(),
    page: Math.max(1, whole("page") ?? 1),
    scope: Math.max(1, whole("scope") ?? 1),
    sample: isSampleKey(values.get("sample")) ? values.get("sample") : null,
    shard: whole("shard"),
  };
  for (const [name, value] of values) {
    if (!name.startsWith("f.")) continue;
    const facet = name.slice(2);
    state.filters.set(facet, (state.filters.get(facet) ?? new Set()).add(value));
  }
  return state;
}

function address(state) {
  const values = new URLSearchParams();
  if (state.view !== "videos") values.set("view", state.view);
  if (state.query) values.set("q", state.query);
  if (state.sort !== "plan") values.set("sort", state.sort);
  for (const [facet, chosen] of state.filters) for (const value of chosen) values.append(`f.${facet}`, value);
  if (state.scope > 1) values.set("scope", state.scope);
  if (state.page > 1) values.set("page", state.page);
  if (state.sample) values.set("sample", state.sample);
  if (state.sample && state.shard !== null) values.set("shard", state.shard);
  return `#${values}`;
}

const hasFilter = (state) => state.query.trim() !== "" || state.filters.size > 0;
