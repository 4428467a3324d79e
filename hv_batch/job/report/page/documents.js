// Coerces the documents of a report. They are untrusted: a field of a wrong type becomes empty, lists are cut, and a
// key that is not one of hv_batch's layout never becomes a URL.

const MAX_TEXT = 2000; // characters of a prompt or message
const MAX_SAMPLES = 1e9;
const SAMPLE_KEY = /^[A-Za-z0-9][A-Za-z0-9._-]{0,101}$/;
const MEDIA = /^(data|posters)\/shard-(\d{5,})\/(.+)-[0-9a-f]{8}\.(mp4|png|jpg)$/;
const PART = /^parts\/shard-\d{5,}\.json$/;
const STATES = ["committed", "quarantined", "pending", "withdrawn"];

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const number = (value, fallback = 0) => (typeof value === "number" && Number.isFinite(value) ? value : fallback);
const count = (value) => Math.min(MAX_SAMPLES, Math.max(0, Math.floor(number(value))));
const text = (value, max = MAX_TEXT) => (typeof value === "string" ? value.slice(0, max) : "");
const list = (value, max) => (Array.isArray(value) ? value.slice(0, max) : []);
const entries = (value, max = 1000) => (isObject(value) ? Object.entries(value).slice(0, max) : []);
const numbers = (value, max) => new Map(entries(value, max).map(([name, n]) => [name.slice(0, 300), number(n)]));
const finite = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

// JSON.parse rounds integers above 2^53, and a seed may have 63 bits. The pattern cannot match inside a string, where a
// quote has a backslash before it.
function parseDocument(source) {
  return JSON.parse(source.replace(/"seed":\s*(\d{16,19})(?=\s*[,}])/g, '"seed":"$1"'));
}

function isSampleKey(key) {
  return typeof key === "string" && SAMPLE_KEY.test(key) && !key.includes("..") && !key.endsWith(".");
}

const shardName = (shard) => `shard-${String(shard).padStart(5, "0")}`;

// The URL of a media file or poster, or null if the path is not that of this sample.
function mediaUrl(path, folder, shard, key) {
  const match = typeof path === "string" && path.length < 300 ? MEDIA.exec(path) : null;
  const fits = match && match[1] === folder && `shard-${match[2]}` === shardName(shard) && match[3] === key;
  return fits && isSampleKey(key) ? `../${path}` : null;
}

function recordUrl(sample) {
  const folder = { committed: "commits", quarantined: "quarantine", withdrawn: "withdrawn" }[sample.state];
  return folder && sample.key ? `../${folder}/${shardName(sample.shard)}/${sample.key}.json` : null;
}

function readSeed(value) {
  return typeof value === "string" && /^\d{1,19}$/.test(value) ? value : typeof value === "number" ? String(value) : "";
}

// One sample of a part. `at` is its place in the plan.
function readSample(raw, shard, at) {
  raw = isObject(raw) ? raw : {};
  const key = isSampleKey(raw.key) ? raw.key : null;
  const facets = new Map(
    entries(raw.facets, 64).map(([name, value]) => [name.slice(0, 300), text(String(value), 300)]),
  );
  return {
    at,
    shard,
    key,
    id: text(raw.id, 300) || key || "",
    row: raw.row === undefined || raw.row === null ? null : text(String(raw.row), 300),
    video: count(raw.video),
    videos: 1, // of the same row; see countVideos
    state: STATES.includes(raw.state) ? raw.state : "pending",
    prompt: text(raw.prompt),
    file: mediaUrl(raw.file, "data", shard, key),
    poster: mediaUrl(raw.poster, "posters", shard, key),
    bytes: count(raw.bytes),
    width: count(raw.width),
    height: count(raw.height),
    frames: count(raw.frames),
    fps: number(raw.fps),
    steps: count(raw.steps),
    seed: readSeed(raw.seed),
    guidance: finite(raw.guidance),
    cfg: finite(raw.cfg),
    flags: list(raw.flags, 20)
      .map((flag) => text(flag, 60))
      .filter(Boolean),
    facets,
    failure: text(raw.class, 32),
    message: text(raw.message),
    seconds: numbers(raw.seconds, 16),
  };
}

function readShard(raw) {
  raw = isObject(raw) ? raw : {};
  const shard = { shard: count(raw.shard), samples: count(raw.samples), bytes: count(raw.bytes) };
  for (const state of STATES) shard[state] = count(raw[state]);
  shard.part = typeof raw.part === "string" && PART.test(raw.part) ? raw.part : null;
  shard.facets = new Map(entries(raw.facets, 64).map(([name, values]) => [name, numbers(values, 500)]));
  return shard;
}

function readCause(raw) {
  raw = isObject(raw) ? raw : {};
  const examples = list(raw.examples, 3)
    .filter(isObject)
    .map((each) => ({
      key: isSampleKey(each.key) ? each.key : null,
      id: text(each.id, 300),
      shard: count(each.shard),
      prompt: text(each.prompt),
    }));
  return {
    failure: text(raw.class, 32),
    message: text(raw.message),
    count: count(raw.count),
    examples,
    traceback: text(raw.traceback, 20000),
    retry: text(raw.retry, 2000),
  };
}

function readTotals(raw) {
  raw = isObject(raw) ? raw : {};
  const media = isObject(raw.media) ? raw.media : {};
  const totals = { samples: count(raw.samples) };
  for (const state of STATES) totals[state] = count(raw[state]);
  return {
    ...totals,
    media: { seconds: number(media.seconds), frames: number(media.frames), bytes: number(media.bytes) },
    gpuSeconds: numbers(raw.gpu_seconds, 40),
    wallSeconds: finite(raw.wall_seconds),
    price: finite(raw.price_per_gpu_hour),
  };
}

function readSpread(raw) {
  raw = isObject(raw) ? raw : {};
  return {
    count: count(raw.count),
    ...Object.fromEntries(["mean", "p10", "p50", "p90", "max"].map((n) => [n, number(raw[n])])),
  };
}

function readTimeline(raw) {
  if (!isObject(raw)) return null;
  const from = number(raw.from),
    to = number(raw.to);
  const rows = list(raw.rows, 500)
    .filter(isObject)
    .map((row) => ({
      worker: text(row.worker, 100),
      stage: text(row.stage, 40),
      node: text(row.node, 100),
      gpus: number(row.gpus),
      spans: list(row.spans, 2000)
        .filter(Array.isArray)
        .map((s) => ({
          from: number(s[0]),
          to: number(s[1]),
          kind: text(s[2], 20),
          samples: count(s[3]),
        }))
        .filter((span) => span.to >= span.from && span.to >= from && span.from <= to),
    }));
  return to > from && rows.length ? { from, to, rows, left: count(raw.rows_left_out) } : null;
}

function readReport(raw) {
  raw = isObject(raw) ? raw : {};
  let start = 0;
  const shards = list(raw.shards, 200000).map(readShard);
  for (const shard of shards) {
    shard.start = start;
    start += shard.samples;
  }
  return {
    generatedAt: number(raw.generated_at),
    finished: raw.finished === true,
    running: raw.running === true,
    refreshSeconds: finite(raw.refresh_s),
    name: text(raw.name, 300),
    run: isObject(raw.run) ? raw.run : {},
    totals: readTotals(raw.totals),
    shards,
    samples: start,
    facets: new Map(entries(raw.facets, 64).map(([name, values]) => [name, numbers(values, 500)])),
    causes: list(raw.causes, 500).map(readCause),
    stages: new Map(
      entries(raw.stages, 65).map(([shape, stages]) => [
        shape,
        new Map(entries(stages, 16).map(([stage, spread]) => [stage, readSpread(spread)])),
      ]),
    ),
    progress: list(raw.progress, 2000)
      .filter(Array.isArray)
      .map((p) => ({ at: number(p[0]), committed: count(p[1]), quarantined: count(p[2]), pending: count(p[3]) })),
    timeline: readTimeline(raw.timeline),
    etaSeconds: finite(raw.eta_s),
  };
}
