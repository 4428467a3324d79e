// Which samples are shown, and in which order. Without a filter in the order of the plan nothing is fetched beforehand:
// the grid asks for the samples in view. A search, filter or sort reads the parts of all shards that may match. In a
// run of more samples than SCOPE it covers one slice of the plan at a time.

const SCOPE = 100000; // samples that one search covers
const PAINT_MS = 250;
const OTHER = "other"; // the value of a facet that stands for all values without a count of their own

function facetValues(sample, facet) {
  if (facet === "state") return [sample.state];
  if (facet === "shape") return [`${sample.height}x${sample.width}x${sample.frames}`];
  if (facet === "class") return sample.failure ? [sample.failure] : [];
  if (facet === "flags") return sample.flags;
  const value = sample.facets.get(facet);
  return value === undefined ? [] : [value];
}

function searchText(sample) {
  sample.search ??= [
    sample.id,
    sample.key ?? "",
    sample.prompt,
    sample.seed,
    `${sample.width}x${sample.height}`,
    sample.failure,
    sample.message,
    ...sample.flags,
  ]
    .join("\n")
    .toLowerCase();
  return sample.search;
}

function totalSeconds(sample) {
  let total = 0;
  for (const seconds of sample.seconds.values()) total += seconds;
  return total;
}

const ORDERS = {
  slowest: (a, b) => totalSeconds(b) - totalSeconds(a) || a.at - b.at,
  // Samples without a time, which are not rendered, come last.
  fastest: (a, b) => (totalSeconds(a) || Infinity) - (totalSeconds(b) || Infinity) || a.at - b.at,
  largest: (a, b) => b.bytes - a.bytes || a.at - b.at,
  id: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : a.at - b.at),
};

class Results {
  constructor(parts, changed) {
    this.parts = parts;
    this.changed = changed; // called when the list has changed
    this.run = 0;
    this.items = null; // null: all samples of the scope in the order of the plan
    this.progress = null; // [shards read, shards to read] of a search that goes on
  }

  get scopes() {
    const found = [];
    for (const shard of this.parts.shards) {
      const last = found.at(-1);
      if (last && last.samples + shard.samples <= SCOPE) {
        last.samples += shard.samples;
        last.shards.push(shard);
      } else found.push({ start: shard.start, samples: shard.samples, shards: [shard] });
    }
    return found;
  }

  get length() {
    return this.items ? this.items.length : this.parts.samples;
  }

  sample(index) {
    return this.items ? (this.items[index] ?? null) : this.parts.sample(index);
  }

  // Fetch the samples in view that are not here yet.
  need(from, to) {
    if (this.items) return;
    for (let at = from; at < to;) {
      const shard = this.parts.at(at);
      if (!shard) return;
      const end = shard.start + shard.samples;
      const hinted = shard.hinted && this.parts.hints.has(at) && this.parts.hints.has(Math.min(to, end) - 1);
      if (!this.parts.isComplete(shard) && !hinted) this.parts.load(shard, true);
      at = Math.max(end, at + 1);
    }
  }

  // Apply a filter and an order. `refresh`: the same as before on newer documents, so the old list stays until the end.
  async select(report, state, refresh = false) {
    const run = ++this.run;
    if (!hasFilter(state) && state.sort === "plan") {
      this.items = this.progress = null;
      return this.changed();
    }
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const named = new Map([...report.facets].map(([facet, values]) => [facet, new Set(values.keys())]));
    const accepts = (sample) =>
      words.every((word) => searchText(sample).includes(word)) &&
      [...state.filters].every(([facet, chosen]) =>
        facetValues(sample, facet).some(
          (value) => chosen.has(value) || (chosen.has(OTHER) && !named.get(facet)?.has(value)),
        ),
      );
    const scopes = this.scopes;
    const shards = (scopes[Math.min(state.scope, scopes.length) - 1]?.shards ?? []).filter((s) =>
      mayMatch(s, state.filters),
    );
    const found = [];
    let painted = performance.now(),
      read = 0;
    const paint = (done) => {
      if (state.sort !== "plan") found.sort(ORDERS[state.sort]);
      if (done || !refresh) this.items = found;
      this.progress = done ? null : [read, shards.length];
      painted = performance.now();
      this.changed();
    };
    const missing = shards.filter((shard) => !this.parts.isComplete(shard));
    for (const shard of missing) this.parts.load(shard);
    if (missing.length && !refresh) paint(false);
    for (const shard of shards) {
      const samples = await this.parts.load(shard);
      if (run !== this.run) return undefined;
      for (const sample of samples) if (accepts(sample)) found.push(sample);
      read += 1;
      if (performance.now() - painted > PAINT_MS) {
        paint(false);
        await new Promise((resolve) => {
          setTimeout(resolve);
        });
        if (run !== this.run) return undefined;
      }
    }
    return paint(true);
  }
}

// Whether the counts of a shard allow a match. A facet that the shard has no counts for excludes nothing.
function mayMatch(shard, filters) {
  return [...filters].every(([facet, chosen]) => {
    const values = shard.facets.get(facet);
    return !values || chosen.has(OTHER) || values.has(OTHER) || [...chosen].some((value) => values.get(value) > 0);
  });
}
