// The dialog of one sample: the video, the other videos of its prompt, and its record.

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
    // A loaded sample is shown at once, so that a dialog that is closed right after a step returns to the new sample.
    const sample = this.parts.known(key, shard) ?? (await this.parts.find(key, shard));
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
      this.dialog.replaceChildren(
        el(
          "div",
          { class: "sheet" },
          el("div", { class: "sheet-head" }, el("h2", { id: "sample-id", text: key }), close),
          el("p", {
            text: canFetch
              ? "The report does not have this sample."
              : "This sample is not among those that are embedded in the page.",
          }),
        ),
      );
    } else {
      const previous = el("button", {
        type: "button",
        class: "button",
        "aria-label": "Previous sample",
        click: () => this.step(-1),
        text: "‹",
      });
      const next = el("button", {
        type: "button",
        class: "button",
        "aria-label": "Next sample",
        click: () => this.step(1),
        text: "›",
      });
      const head = el(
        "div",
        { class: "sheet-head" },
        el("h2", { id: "sample-id", dir: "auto", tabindex: "-1", text: sample.id }),
        el("span", { class: `pill ${sample.state}`, text: humanize(sample.state) }),
        el("span", { class: "spring" }),
        previous,
        next,
        close,
      );
      const record = el("div", { class: "record" });
      this.dialog.replaceChildren(
        el(
          "div",
          { class: "sheet" },
          head,
          el(
            "div",
            { class: "sheet-body" },
            el(
              "div",
              { class: "main" },
              this.media(sample),
              clamped(sample.prompt || "No prompt is recorded yet.", "prompt"),
              el(
                "p",
                { class: "chips" },
                chipsOf(sample).map((chip) => el("span", { text: chip })),
                sample.file && el("a", { href: sample.file, download: true, text: `Download, ${size(sample.bytes)}` }),
              ),
              this.siblings(sample),
            ),
            record,
          ),
        ),
      );
      this.fillRecord(record, sample);
    }
    if (!this.dialog.open) this.dialog.showModal();
    byId("sample-id").focus();
    this.dialog.scrollTop = 0;
  }

  media(sample) {
    const stage = el("div", { class: "stage large" });
    stage.style.aspectRatio = `${sample.width || 16} / ${sample.height || 9}`;
    if (sample.file && isImage(sample))
      stage.append(el("img", { class: "ready", src: sample.file, alt: sample.prompt.slice(0, 300) }));
    else if (sample.file) {
      const video = el("video", {
        src: sample.file,
        poster: sample.poster,
        preload: "none",
        controls: true,
        loop: true,
        playsinline: true,
        "aria-label": `Video ${sample.id}`,
      });
      video.muted = true;
      video.addEventListener(
        "error",
        () =>
          stage.isConnected &&
          video.hasAttribute("src") &&
          stage.replaceChildren(
            el("p", { class: "state", text: "This browser cannot play the file, or it is not there" }),
          ),
      );
      stage.append(video);
      // Who opens a sample wants to see it.
      if (!stillWanted.matches) requestAnimationFrame(() => video.isConnected && video.play().catch(() => {}));
    } else {
      stage.classList.add("none");
      stage.style.aspectRatio = "auto";
      stage.append(
        el("p", {
          class: "state",
          text: sample.state === "quarantined" ? "No video: the sample failed" : humanize(sample.state),
        }),
      );
    }
    return sample.state === "quarantined"
      ? el("div", {}, stage, el("p", { class: "why" }, el("strong", { text: sample.failure }), ` ${sample.message}`))
      : stage;
  }

  // The other videos of the same prompt. They follow each other in the plan.
  siblings(sample) {
    const shard = this.parts.byNumber.get(sample.shard);
    const all = (shard && this.parts.loaded.get(shard.shard)) ?? [...this.parts.hints.values()];
    const videos = sample.row === null ? [] : all.filter((each) => each.row === sample.row && each.key);
    if (videos.length < 2) return null;
    const items = videos.slice(0, 64).map((each) => {
      const stage = el(
        "span",
        { class: "stage" },
        picture(each, false),
        el("span", { class: "badge left", text: `Video ${each.video + 1}` }),
        each.state !== "committed" && el("span", { class: `state ${each.state}`, text: humanize(each.state) }),
      );
      stage.sample = each;
      const link = el(
        "a",
        { href: this.href(each), "aria-current": each.key === sample.key ? "true" : null },
        stage,
        el("span", { class: "seed", text: each.seed ? `seed ${each.seed}` : each.id }),
      );
      link.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && preview.start(stage, each));
      link.addEventListener("pointerleave", () => preview.stop());
      return el("li", {}, link);
    });
    const strip = el("ul", { class: "strip" }, items);
    return el(
      "section",
      { class: "siblings" },
      el(
        "div",
        { class: "row" },
        el("h3", { text: `${videos.length} videos of this prompt` }),
        el("button", {
          type: "button",
          class: "button",
          text: "Play all",
          click: (event) => playAll(strip, event.currentTarget),
        }),
      ),
      strip,
    );
  }

  href(sample) {
    return address({ ...readAddress(), sample: sample.key, shard: sample.shard });
  }

  step(by) {
    const at = this.results.items
      ? this.results.items.findIndex((each) => each.key === this.sample?.key)
      : this.sample?.at;
    const next = at === undefined || at < 0 ? null : this.results.sample(at + by);
    if (next?.key) this.navigate(next, null);
    else if (!this.results.items && at + by >= 0 && at + by < this.results.length) {
      const shard = this.parts.at(at + by);
      if (!this.parts.isComplete(shard))
        this.parts.load(shard, true).then(() => this.results.sample(at + by)?.key && this.step(by));
    }
  }

  async fillRecord(root, sample) {
    const url = recordUrl(sample);
    const known = {
      prompt: sample.prompt,
      height: sample.height,
      width: sample.width,
      num_frames: sample.frames,
      num_inference_steps: sample.steps || null,
      seed: sample.seed,
      guidance_scale: sample.guidance,
      cfg_scale: sample.cfg,
    };
    if (!url) {
      root.append(el("p", { class: "soft", text: "The sample has no record yet." }));
      return;
    }
    if (!canFetch) {
      root.append(
        commandBlock(known, false),
        el("p", { class: "notice" }, "A page from a disk cannot read the record. ", serveHint()),
        factTable(stageFacts([...sample.seconds])),
      );
      return;
    }
    const run = this.run;
    let record = null,
      source = "";
    try {
      const response = await fetch(url, { cache: "no-cache" });
      if (!response.ok) throw new Error(`the server answers ${response.status}`);
      source = await response.text();
      if (source.length > MAX_RECORD) throw new Error(`it has ${size(source.length)}`);
      record = JSON.parse(source, exactIntegers);
      if (!isObject(record)) throw new Error("it is not an object");
    } catch (error) {
      root.append(
        commandBlock(known, false),
        el("p", { class: "notice", text: `The record ${url.slice(3)} cannot be read: ${error.message}.` }),
      );
      return;
    }
    if (run === this.run) root.append(...recordSections(record, sample, this.report), rawRecord(source));
  }
}

function playAll(strip, button) {
  const playing = strip.querySelectorAll("video");
  if (playing.length) {
    for (const video of playing) discard(video);
    button.textContent = "Play all";
    return;
  }
  preview.stop();
  for (const stage of strip.querySelectorAll(".stage"))
    if (stage.sample.file && !isImage(stage.sample)) preview.play(stage, stage.sample);
  button.textContent = "Stop";
}

function serveHint() {
  return el(
    "span",
    {},
    "To see all samples and records, run ",
    el("code", { text: `hv-batch report ${outputRoot()} --serve` }),
    ".",
  );
}

// The output root of a page that was opened from a disk.
function outputRoot() {
  let path = "OUTPUT";
  try {
    if (location.protocol === "file:")
      path = shellQuote(decodeURIComponent(location.pathname).replace(/\/report\/[^/]*$/, "") || "/");
  } catch {
    return "OUTPUT";
  }
  return path;
}
