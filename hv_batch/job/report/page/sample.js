// The dialog of one sample: the video, the other videos of its prompt, its whole record, and the command that renders it again.

const MAX_RECORD = 8e6; // characters of a record that the page reads
const RECORD_PARTS = [
  ["Parameters", ["params", "fps"]],
  ["How it was rendered", null],
  ["Columns of the manifest", ["extra"]],
  ["Scores of the frames", ["scores"]],
  ["Answer of the sample hook", ["hook"]],
  ["File", ["file", "bytes", "sha256", "frames_sha256", "produced", "poster"]],
  ["Versions", ["versions"]],
  ["Record", ["id", "key", "row", "video_index", "shard", "attempts", "class", "fingerprint", "licence", "created_at", "reason", "withdrawn_at"]],
];

const USER_NAMED = new Set(["extra", "hook"]);

// The parameters without a prompt that the dialog already shows.
function without(value, sample) {
  if (!isObject(value) || value.prompt !== sample.prompt) return value;
  return Object.fromEntries(entries(value).filter(([name]) => name !== "prompt"));
}

class SampleView {
  constructor(results, parts, navigate) {
    Object.assign(this, { results, parts, navigate, dialog: byId("sample"), sample: null, run: 0 });
    this.dialog.addEventListener("close", () => {
      for (const video of this.dialog.querySelectorAll("video")) discard(video);
      preview.stop();
      this.dialog.replaceChildren();
      const was = this.sample;
      this.sample = null;
      if (was) this.navigate(null, was);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("keydown", (event) => {
      if (event.target.closest("video, input, textarea, pre") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowLeft") this.step(-1);
      if (event.key === "ArrowRight") this.step(1);
    });
  }

  // Show the sample with this key; null closes the dialog. `report` names the run.
  async open(key, shard, report) {
    if (key === (this.sample?.key ?? null)) return;
    const run = ++this.run;
    if (!key) {
      this.sample = null;
      this.dialog.close();
      return;
    }
    const sample = await this.parts.find(key, shard);
    if (run !== this.run) return;
    this.show(sample, key, report);
  }

  show(sample, key, report) {
    for (const video of this.dialog.querySelectorAll("video")) discard(video);
    preview.stop();
    this.sample = sample ?? { key };
    this.report = report;
    const close = el("button", { type: "button", class: "button", click: () => this.dialog.close(), text: "Close" });
    if (!sample) {
      this.dialog.replaceChildren(el("div", { class: "sheet" }, el("div", { class: "sheet-head" },
        el("h2", { id: "sample-id", text: key }), close), el("p", { text: canFetch
        ? "The report does not have this sample." : "This sample is not among those that are embedded in the page." })));
    } else {
      const previous = el("button", { type: "button", class: "button", "aria-label": "Previous sample", click: () => this.step(-1), text: "‹" });
      const next = el("button", { type: "button", class: "button", "aria-label": "Next sample", click: () => this.step(1), text: "›" });
      const head = el("div", { class: "sheet-head" },
        el("h2", { id: "sample-id", dir: "auto", tabindex: "-1", text: sample.id }),
        el("span", { class: `pill ${sample.state}`, text: humanize(sample.state) }), el("span", { class: "spring" }), previous, next, close);
      const record = el("div", { class: "record" });
      this.dialog.replaceChildren(el("div", { class: "sheet" }, head, el("div", { class: "sheet-body" },
        el("div", { class: "main" }, this.media(sample), clamped(sample.prompt || "No prompt is recorded yet.", "prompt"),
          el("p", { class: "chips" }, chipsOf(sample).map((chip) => el("span", { text: chip })),
            sample.file && el("a", { href: sample.file, download: true, text: `Download, ${size(sample.bytes)}` })), this.siblings(sample)), record)));
      this.fillRecord(record, sample);
    }
    if (!this.dialog.open) this.dialog.showModal();
    byId("sample-id").focus();
    this.dialog.scrollTop = 0;
  }

  media(sample) {
    const stage = el("div", { class: "stage large" });
    stage.style.aspectRatio = `${sample.width || 16} / ${sample.height || 9}`;
    if (sample.file && isImage(sample)) stage.append(el("img", { class: "ready", src: sample.file, alt: sample.prompt.slice(0, 300) }));
    else if (sample.file) {
      const video = el("video", { src: sample.file, poster: sample.poster, preload: "none", controls: true, loop: true,
        playsinline: true, "aria-label": `Video ${sample.id}` });
      video.muted = true;
      video.addEventListener("error", () => stage.isConnected && video.hasAttribute("src") &&
        stage.replaceChildren(el("p", { class: "state", text: "This browser cannot play the file, or it is not there" })));
      stage.append(video);
      // Who opens a sample wants to see it.
      if (!stillWanted.matches) requestAnimationFrame(() => video.isConnected && video.play().catch(() => {}));
    } else {
      stage.classList.add("none");
      stage.style.aspectRatio = "auto";
      stage.append(el("p", { class: "state", text: sample.state === "quarantined" ? "No video: the sample failed" : humanize(sample.state) }));
    }
    return sample.state === "quarantined" ? el("div", {}, stage, el("p", { class: "why" }, el("strong", { text: sample.failure }), ` ${sample.message}`)) : stage;
  }

  // The other videos of the same prompt. They follow each other in the plan.
  siblings(sample) {
    const shard = this.parts.byNumber.get(sample.shard);
    const all = (shard && this.parts.loaded.get(shard.shard)) ?? [...this.parts.hints.values()];
    const videos = sample.row === null ? [] : all.filter((each) => each.row === sample.row && each.key);
    if (videos.length < 2) return null;
    const items = videos.slice(0, 64).map((each) => {
      const stage = el("span", { class: "stage" }, picture(each, false), el("span", { class: "badge left", text: `Video ${each.video + 1}` }),
        each.state !== "committed" && el("span", { class: `state ${each.state}`, text: humanize(each.state) }));
      stage.sample = each;
      const link = el("a", { href: this.href(each), "aria-current": each.key === sample.key ? "true" : null }, stage,
        el("span", { class: "seed", text: each.seed ? `seed ${each.seed}` : each.id }));
      link.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview.start(stage, each));
      link.addEventListener("pointerleave", () => preview.stop());
      return el("li", {}, link);
    });
    const strip = el("ul", { class: "strip" }, items);
    return el("section", { class: "siblings" }, el("div", { class: "row" }, el("h3", { text: `${videos.length} videos of this prompt` }),
      el("button", { type: "button", class: "button", text: "Play all", click: (event) => playAll(strip, event.currentTarget) })), strip);
  }

  href(sample) {
    return address({ ...readAddress(), sample: sample.key, shard: sample.shard });
  }

  step(by) {
    const at = this.results.items ? this.results.items.findIndex((each) => each.key === this.sample?.key) : this.sample?.at;
    const next = at === undefined || at < 0 ? null : this.results.sample(at + by);
    if (next?.key) this.navigate(next, null);
    else if (!this.results.items && at + by >= 0 && at + by < this.results.length) {
      const shard = this.parts.at(at + by);
      if (!this.parts.isComplete(shard)) this.parts.load(shard, true).then(() => this.results.sample(at + by)?.key && this.step(by));
    }
  }

  async fillRecord(root, sample) {
    const url = recordUrl(sample);
    const known = { prompt: sample.prompt, height: sample.height, width: sample.width, num_frames: sample.frames,
      num_inference_steps: sample.steps || null, seed: sample.seed, guidance_scale: sample.guidance, cfg_scale: sample.cfg };
    if (!url) {
      root.append(el("p", { class: "soft", text: "The sample has no record yet." }));
      return;
    }
    if (!canFetch) {
      root.append(commandBlock(known, false), el("p", { class: "notice" }, "A page from a disk cannot read the record. ", serveHint()),
        factTable(stageFacts([...sample.seconds])));
      return;
    }
    const run = this.run;
    let record = null, source = "";
    try {
      const response = await fetch(url, { cache: "no-cache" });
      if (!response.ok) throw new Error(`the server answers ${response.status}`);
      source = await response.text();
      if (source.length > MAX_RECORD) throw new Error(`it has ${size(source.length)}`);
      record = JSON.parse(source, exactIntegers);
      if (!isObject(record)) throw new Error("it is not an object");
    } catch (error) {
      root.append(commandBlock(known, false), el("p", { class: "notice", text: `The record ${url.slice(3)} cannot be read: ${error.message}.` }));
      return;
    }
    if (run === this.run) root.append(...recordSections(record, sample, this.report), rawRecord(source));
  }
}

// A reviver that keeps the digits of integers that JavaScript would round.
function exactIntegers(name, value, context) {
  return typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) ? context?.source ?? value : value;
}

function playAll(strip, button) {
  const playing = strip.querySelectorAll("video");
  if (playing.length) {
    for (const video of playing) discard(video);
    button.textContent = "Play all";
    return;
  }
  preview.stop();
  for (const stage of strip.querySelectorAll(".stage")) if (stage.sample.file && !isImage(stage.sample)) preview.play(stage, stage.sample);
  button.textContent = "Stop";
}

function serveHint() {
  return el("span", {}, "To see all samples and records, run ", el("code", { text: `hv-batch report ${outputRoot()} --serve` }), ".");
}

// The output root of a page that was opened from a disk.
function outputRoot() {
  let path = "OUTPUT";
  try {
    if (location.protocol === "file:") path = shellQuote(decodeURIComponent(location.pathname).replace(/\/report\/[^/]*$/, "") || "/");
  } catch {
    return "OUTPUT";
  }
  return path;
}

function commandBlock(params, complete) {
  const command = renderCommand(params);
  const note = complete && params.lora ? `The sample used the LoRA ${text(params.lora, 300)}; add its file with --lora. ` : "";
  return el("section", { class: "command" }, el("div", { class: "row" }, el("h3", { text: "Render it again" }), copyButton("Copy", () => command)),
    el("pre", { tabindex: "0", text: command }),
    el("p", { class: "soft", text: `${note}Give the weights with --model-base if they are not in ckpts. Options of the run's config, such as precision, are in run.json.` }));
}

const stageFacts = (seconds) => inPathOrder(seconds).map(([name, value]) => [humanize(name), duration(number(value))]);

function recordSections(record, sample, report) {
  const sections = [];
  if (isObject(record.params)) sections.push(commandBlock(record.params, true));
  if (sample.state === "quarantined") sections.push(retryBlock(sample, report));
  for (const [title, names] of RECORD_PARTS) {
    const facts = names ? names.flatMap((name) => flatten(name, without(record[name], sample), 0, USER_NAMED.has(name))) : renderFacts(record);
    if (facts.length) sections.push(el("section", {}, el("h3", { text: title }), factTable(facts)));
    if (!names) sections.push(...attempts(record));
  }
  return sections;
}

function retryBlock(sample, report) {
  const cause = report.causes.find((each) => each.retry && each.failure === sample.failure);
  const command = cause?.retry ?? `hv-batch retry OUTPUT --class ${shellQuote(sample.failure)} --shards ${sample.shard} --yes`;
  return el("section", { class: "command" }, el("div", { class: "row" }, el("h3", { text: "Release the samples of its class for a retry" }), copyButton("Copy", () => command)),
    el("pre", { tabindex: "0", text: command }));
}

// One line for each stage and for each fact about it.
function renderFacts(record) {
  const stages = isObject(record.stages) ? record.stages : {}, places = isObject(record.places) ? record.places : {};
  const names = inPathOrder([...new Set([...Object.keys(stages), ...Object.keys(places)])].slice(0, 16).map((name) => [name, stages[name]]));
  return stageFacts(names).flatMap(([title, seconds], i) => [[title, seconds], ...entries(places[names[i][0]], 40).flatMap(([fact, value]) =>
    flatten(fact, value).map(([name, shown]) => [el("span", { class: "sub", text: name }), shown]))]);
}

function attempts(record) {
  const history = list(record.history, 50).filter(isObject);
  if (!history.length && !record.traceback) return [];
  const failures = history.map((failure, i) => el("li", {}, el("p", { class: "why" }, el("strong", { text: text(failure.kind, 40) }),
    ` ${text(failure.message)}`), failure.where && el("p", { class: "soft", text: text(failure.where, 200) }), traceback(failure.traceback, `Traceback of attempt ${i + 1}`)));
  return [el("section", {}, el("h3", { text: "Failed attempts" }), failures.length ? el("ol", { class: "attempts" }, failures) : traceback(record.traceback, "Traceback"))];
}

function traceback(value, title) {
  return value ? el("details", {}, el("summary", { text: title }), el("pre", { tabindex: "0", text: text(value, 20000) })) : null;
}

// A value as pairs of a name and a text: one pair for each field of an object. `raw`: the names are those of a user.
function flatten(name, value, depth = 0, raw = false) {
  if (value === undefined || value === null || value === "") return [];
  const title = raw ? name : humanize(name);
  if (isObject(value) && depth < 3) return entries(value, 200).flatMap(([field, inner]) => flatten(field, inner, depth + 1, raw));
  const shown = typeof value === "string" ? value : typeof value === "object" ? JSON.stringify(value) : String(value);
  if (shown.length > 300) return [[title, clamped(shown.slice(0, 20000), "long")]];
  return [[title, shown]];
}

function rawRecord(source) {
  const body = el("pre", { tabindex: "0" });
  let pretty = source;
  try {
    pretty = JSON.stringify(JSON.parse(source, exactIntegers), null, 2);
  } catch { /* shown as it is */ }
  const fold = el("details", { toggle: () => { body.textContent = pretty.slice(0, MAX_RECORD); } }, el("summary", { text: "The whole record as JSON" }), body);
  return el("section", {}, el("h3", { class: "quiet", text: "JSON" }), fold);
}
