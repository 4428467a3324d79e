// The record of a sample as tables, and the commands that render the sample again.

const MAX_RECORD = 8e6; // characters of a record that the page reads
const RECORD_PARTS = [
  ["Parameters", ["params", "fps"]],
  ["How it was rendered", null],
  ["Columns of the manifest", ["extra"]],
  ["Scores of the frames", ["scores"]],
  ["Answer of the sample hook", ["hook"]],
  ["File", ["file", "bytes", "sha256", "frames_sha256", "produced", "poster"]],
  ["Versions", ["versions"]],
  [
    "Record",
    [
      "id",
      "key",
      "row",
      "video_index",
      "shard",
      "attempts",
      "class",
      "fingerprint",
      "licence",
      "created_at",
      "reason",
      "withdrawn_at",
    ],
  ],
];

const USER_NAMED = new Set(["extra", "hook"]);

// The parameters without a prompt that the dialog already shows.
function without(value, sample) {
  if (!isObject(value) || value.prompt !== sample.prompt) return value;
  return Object.fromEntries(entries(value).filter(([name]) => name !== "prompt"));
}

// A reviver that keeps the digits of integers that JavaScript would round.
function exactIntegers(name, value, context) {
  return typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value)
    ? (context?.source ?? value)
    : value;
}

function commandSection(title, command, ...notes) {
  return el(
    "section",
    { class: "command" },
    el(
      "div",
      { class: "row" },
      el("h3", { text: title }),
      copyButton("Copy", () => command),
    ),
    el("pre", { tabindex: "0", text: command }),
    ...notes,
  );
}

function commandBlock(params, complete) {
  const note =
    complete && params.lora ? `The sample used the LoRA ${text(params.lora, 300)}; add its file with --lora. ` : "";
  return commandSection(
    "Render it again",
    renderCommand(params),
    el("p", {
      class: "soft",
      text: `${note}Give the weights with --model-base if they are not in ckpts. Options of the run's config, such as precision, are in run.json.`,
    }),
  );
}

const stageFacts = (seconds) => inPathOrder(seconds).map(([name, value]) => [humanize(name), duration(number(value))]);

function recordSections(record, sample, report) {
  const sections = [];
  if (isObject(record.params)) sections.push(commandBlock(record.params, true));
  if (sample.state === "quarantined") sections.push(retryBlock(sample, report));
  for (const [title, names] of RECORD_PARTS) {
    const facts = names
      ? names.flatMap((name) => flatten(name, without(record[name], sample), 0, USER_NAMED.has(name)))
      : renderFacts(record);
    if (facts.length) sections.push(el("section", {}, el("h3", { text: title }), factTable(facts)));
    if (!names) sections.push(...attempts(record));
  }
  return sections;
}

function retryBlock(sample, report) {
  const cause = report.causes.find((each) => each.retry && each.failure === sample.failure);
  const command =
    cause?.retry ?? `hv-batch retry OUTPUT --class ${shellQuote(sample.failure)} --shards ${sample.shard} --yes`;
  return commandSection("Release the samples of its class for a retry", command);
}

// One line for each stage and for each fact about it.
function renderFacts(record) {
  const stages = isObject(record.stages) ? record.stages : {},
    places = isObject(record.places) ? record.places : {};
  const names = inPathOrder(
    [...new Set([...Object.keys(stages), ...Object.keys(places)])].slice(0, 16).map((name) => [name, stages[name]]),
  );
  return stageFacts(names).flatMap(([title, seconds], i) => [
    [title, seconds],
    ...entries(places[names[i][0]], 40).flatMap(([fact, value]) =>
      flatten(fact, value).map(([name, shown]) => [el("span", { class: "sub", text: name }), shown]),
    ),
  ]);
}

function attempts(record) {
  const history = list(record.history, 50).filter(isObject);
  if (!history.length && !record.traceback) return [];
  const failures = history.map((failure, i) =>
    el(
      "li",
      {},
      el("p", { class: "why" }, el("strong", { text: text(failure.kind, 40) }), ` ${text(failure.message)}`),
      failure.where && el("p", { class: "soft", text: text(failure.where, 200) }),
      traceback(failure.traceback, `Traceback of attempt ${i + 1}`),
    ),
  );
  return [
    el(
      "section",
      {},
      el("h3", { text: "Failed attempts" }),
      failures.length ? el("ol", { class: "attempts" }, failures) : traceback(record.traceback, "Traceback"),
    ),
  ];
}

function traceback(value, title) {
  return value
    ? el("details", {}, el("summary", { text: title }), el("pre", { tabindex: "0", text: text(value, 20000) }))
    : null;
}

// A value as pairs of a name and a text: one pair for each field of an object. `raw`: the names are those of a user.
function flatten(name, value, depth = 0, raw = false) {
  if (value === undefined || value === null || value === "") return [];
  const title = raw ? name : humanize(name);
  if (isObject(value) && depth < 3)
    return entries(value, 200).flatMap(([field, inner]) => flatten(field, inner, depth + 1, raw));
  const shown = typeof value === "string" ? value : typeof value === "object" ? JSON.stringify(value) : String(value);
  if (shown.length > 300) return [[title, clamped(shown.slice(0, 20000), "long")]];
  return [[title, shown]];
}

function rawRecord(source) {
  const body = el("pre", { tabindex: "0" });
  let pretty = source;
  try {
    pretty = JSON.stringify(JSON.parse(source, exactIntegers), null, 2);
  } catch {
    /* shown as it is */
  }
  const fold = el(
    "details",
    {
      toggle: () => {
        body.textContent = pretty.slice(0, MAX_RECORD);
      },
    },
    el("summary", { text: "The whole record as JSON" }),
    body,
  );
  return el("section", {}, el("h3", { class: "quiet", text: "JSON" }), fold);
}
