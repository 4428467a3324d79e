// The samples of the run. From a server, the parts of the shards are fetched when they are needed; a page from a disk
// may not fetch, and has only the samples that are embedded in it.

const MAX_REQUESTS = 4;
const MAX_LOADED = 200000; // samples in memory; the shards that were not used for the longest time are dropped
const RETRY_MS = 5000;
const MAX_DOCUMENT = 2e8; // bytes of a document that the page reads
const canFetch = location.protocol === "http:" || location.protocol === "https:";

// Set how many videos the prompt of each sample has. They follow each other in the plan, and may go on in the next shard.
function countVideos(samples) {
  for (let from = 0; from < samples.length;) {
    let to = from + 1;
    while (to < samples.length && samples[from].row !== null && samples[to].row === samples[from].row) to += 1;
    for (let at = from; at < to; at += 1) samples[at].videos = Math.max(to - from, samples[at].video + 1);
    from = to;
  }
  return samples;
}

async function fetchDocument(url) {
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  if (Number(response.headers.get("Content-Length")) > MAX_DOCUMENT) throw new Error("it is too large");
  return parseDocument(await response.text());
}

class Parts {
  constructor(first, changed) {
    this.first = first;
    this.changed = changed; // called when samples have arrived
    this.loaded = new Map(); // number of a shard to its samples, the most recently used last
    this.queue = [];
    this.active = 0;
    this.shards = [];
    this.hints = new Map();
  }

  // Take the shards of a report. Parts that have changed are fetched again when they are next needed.
  update(report) {
    const before = new Map(this.shards.map((shard) => [shard.shard, shard]));
    if (canFetch) this.shards = report.shards;
    else if (!before.size) this.shards = this.embedded();
    this.byNumber = new Map(this.shards.map((shard) => [shard.shard, shard]));
    this.samples = this.shards.reduce((sum, shard) => sum + shard.samples, 0);
    const signature = ({ part, bytes, committed, quarantined, withdrawn, pending }) =>
      [part, bytes, committed, quarantined, withdrawn, pending].join();
    for (const [number, old] of before) {
      const now = this.byNumber.get(number);
      if (now && signature(now) === signature(old)) Object.assign(now, { known: old.known, hinted: old.hinted });
    }
    if (!before.size && canFetch) this.hints = this.embeddedHints();
  }

  // The embedded samples by their place in the plan. They are the first of each part, until there are enough.
  embeddedHints() {
    const hints = new Map(),
      taken = new Map();
    for (const raw of this.first) {
      const shard = this.byNumber.get(isObject(raw) ? raw.shard : null),
        at = taken.get(shard) ?? 0;
      if (!shard || at >= shard.samples) continue;
      taken.set(shard, at + 1);
      shard.hinted = true; // the embedded samples are those of its part
      hints.set(shard.start + at, readSample(raw, shard.shard, shard.start + at));
    }
    countVideos([...hints.values()]);
    return hints;
  }

  // The number of videos of every prompt, as far as the embedded samples tell; 1 if the prompts differ in it.
  videosOfAll() {
    const rows = new Map();
    for (const raw of this.first) if (isObject(raw)) rows.set(raw.row, (rows.get(raw.row) ?? 0) + 1);
    const found = new Set([...rows.values()].slice(0, Math.max(1, rows.size - 1))); // the last may be cut
    return found.size === 1 ? Math.min(16, ...found) : 1;
  }

  // The embedded samples as shards of a report.
  embedded() {
    const shards = new Map();
    this.first.forEach((raw, at) => {
      const number = count(isObject(raw) ? raw.shard : 0);
      const shard = shards.get(number) ?? { shard: number, samples: 0, known: true, facets: new Map(), start: at };
      this.loaded.set(number, [...(this.loaded.get(number) ?? []), readSample(raw, number, at)]);
      shards.set(number, { ...shard, samples: shard.samples + 1 });
    });
    for (const samples of this.loaded.values()) countVideos(samples);
    return [...shards.values()];
  }

  // The shard that holds the sample at this place of the plan.
  at(place) {
    let low = 0,
      high = this.shards.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.shards[middle].start <= place) low = middle;
      else high = middle - 1;
    }
    return this.shards[low];
  }

  // The sample at a place of the plan; null if it is not here yet, or if nothing is recorded about it.
  sample(place) {
    const shard = this.at(place);
    const samples = shard && this.loaded.get(shard.shard);
    return samples?.[place - shard.start] ?? this.hints.get(place) ?? null;
  }

  isComplete(shard) {
    return (shard.known && this.loaded.has(shard.shard)) || !shard.part;
  }

  // The samples of a shard, fetched if necessary. An empty list if there are none, or if they cannot be read.
  async load(shard, urgent = false) {
    if (this.isComplete(shard)) return this.touch(shard.shard);
    if (shard.failedAt && Date.now() - shard.failedAt < RETRY_MS) return this.loaded.get(shard.shard) ?? [];
    if (!shard.promise) {
      shard.promise = new Promise((resolve) => {
        this.queue[urgent ? "push" : "unshift"]({ shard, resolve });
      });
      this.pump();
    } else if (urgent) {
      const at = this.queue.findIndex((each) => each.shard === shard);
      if (at >= 0) this.queue.push(...this.queue.splice(at, 1));
    }
    return shard.promise;
  }

  // The visible shards are fetched last in, first out: after a jump, those in between can wait.
  pump() {
    while (this.active < MAX_REQUESTS && this.queue.length) {
      const { shard, resolve } = this.queue.pop();
      this.active += 1;
      this.fetch(shard).then((samples) => {
        this.active -= 1;
        shard.promise = null;
        resolve(samples);
        this.pump();
      });
    }
  }

  async fetch(shard) {
    try {
      const raw = await fetchDocument(shard.part);
      const samples = countVideos(
        list(raw.samples, shard.samples).map((each, i) => readSample(each, shard.shard, shard.start + i)),
      );
      this.loaded.set(shard.shard, samples);
      const latest = this.byNumber.get(shard.shard);
      shard.known = true;
      if (latest) latest.known = latest === shard || latest.known;
      shard.failedAt = 0;
      this.evict();
      this.changed(shard);
      return samples;
    } catch {
      shard.failedAt = Date.now();
      this.changed(shard);
      return this.loaded.get(shard.shard) ?? [];
    }
  }

  touch(number) {
    const samples = this.loaded.get(number) ?? [];
    if (this.loaded.delete(number)) this.loaded.set(number, samples);
    return samples;
  }

  evict() {
    let total = 0;
    for (const samples of this.loaded.values()) total += samples.length;
    for (const [number, samples] of this.loaded) {
      if (total <= MAX_LOADED) break;
      this.loaded.delete(number);
      total -= samples.length;
    }
  }

  // The sample with this key if it is here, without any request.
  known(key, number) {
    const shard = this.byNumber.get(number),
      hints = shard?.hinted ? [...this.hints.values()] : [];
    const here = [...(shard && this.isComplete(shard) ? this.touch(number) : []), ...hints];
    return here.find((sample) => sample.key === key && sample.shard === number) ?? null;
  }

  // Find a sample by its key, in its shard if that is known, else in all shards.
  async find(key, number) {
    const known = this.byNumber.get(number);
    for (const shard of known ? [known] : this.shards) {
      const found = (await this.load(shard, true)).find((sample) => sample.key === key);
      if (found) return found;
    }
    return [...this.hints.values()].find((sample) => sample.key === key) ?? null;
  }
}
