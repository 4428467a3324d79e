// One card of the grid: poster or placeholder, prompt, parameters. A video is fetched only while the pointer or the
// focus stays on its card.

const HOVER_MS = 150;
const MAX_IMAGE = 4e6; // bytes of an image file without poster that a card still shows
const stillWanted = matchMedia("(prefers-reduced-motion: reduce)");

// Posters are fetched when their card comes near the viewport and stays there for a moment.
const posterWatch = new IntersectionObserver(
  (seen) => {
    for (const { target, isIntersecting } of seen) {
      if (isIntersecting)
        target.timer = setTimeout(() => {
          target.src = target.dataset.src;
          posterWatch.unobserve(target);
        }, 60);
      else clearTimeout(target.timer);
    }
  },
  { rootMargin: "200px" },
);

function isImage(sample) {
  return sample.frames === 1;
}

function posterOf(sample) {
  return sample.poster ?? (isImage(sample) && sample.bytes <= MAX_IMAGE ? sample.file : null);
}

// The picture of a sample: its poster, or a box of its shape.
function picture(sample, lazy = true) {
  const url = posterOf(sample);
  const box = svg(
    "svg",
    { class: "blank", viewBox: `0 0 ${sample.width || 16} ${sample.height || 9}`, "aria-hidden": "true" },
    svg("rect", { width: sample.width || 16, height: sample.height || 9 }),
  );
  if (!url) return [box];
  const image = el("img", { alt: "", decoding: "async", width: sample.width || null, height: sample.height || null });
  image.addEventListener("load", () => image.classList.add("ready"));
  image.addEventListener("error", () => image.remove());
  if (lazy) {
    image.dataset.src = url;
    posterWatch.observe(image);
  } else image.src = url;
  return [box, image];
}

function chipsOf(sample) {
  const chips = sample.width ? [`${sample.width} × ${sample.height}`] : [];
  if (sample.frames) chips.push(isImage(sample) ? "image" : `${sample.frames} frames`);
  if (sample.steps) chips.push(plural(sample.steps, "step"));
  if (sample.seed) chips.push(`seed ${sample.seed}`);
  if (sample.guidance !== null) chips.push(`guidance ${significant(sample.guidance, 4)}`);
  if (sample.cfg !== null && sample.cfg > 1) chips.push(`CFG ${significant(sample.cfg, 4)}`);
  return chips;
}

function cardLabel(sample) {
  const parts = [sample.id, humanize(sample.state)];
  if (sample.videos > 1) parts.push(`video ${sample.video + 1} of ${sample.videos} of this prompt`);
  if (sample.state === "quarantined") parts.push(`${sample.failure}: ${sample.message.slice(0, 100)}`);
  return [...parts, sample.prompt.slice(0, 140)].join(". ");
}

// The state of a sample without a video, for a failed one with its message.
function stateOf(sample) {
  const failed = sample.state === "quarantined";
  return el(
    "span",
    { class: "outcome" },
    el("span", {
      class: `state ${sample.state}`,
      text: failed && sample.failure ? `Quarantined: ${sample.failure}` : humanize(sample.state),
    }),
    sample.message && el("span", { class: "message", dir: "auto", text: sample.message }),
  );
}

// Fill the link of a card. `sample` is null while its part is not here; `waiting` says whether it will come.
function fillCard(link, sample, place, waiting, href) {
  for (const image of link.querySelectorAll("img")) posterWatch.unobserve(image);
  if (!sample) {
    link.removeAttribute("href");
    link.setAttribute(
      "aria-label",
      waiting ? `Sample ${integer(place + 1)}, loading` : `Sample ${integer(place + 1)}, pending`,
    );
    link.replaceChildren(
      el("div", { class: "stage" }, el("span", { class: "state", text: waiting ? "Loading" : "Pending" })),
      el("div", { class: "text" }, el("p", { class: "id", text: `Sample ${integer(place + 1)}` })),
    );
    return;
  }
  if (sample.key) link.setAttribute("href", href(sample));
  else link.removeAttribute("href");
  link.setAttribute("aria-label", cardLabel(sample));
  const seconds = sample.fps > 0 && !isImage(sample) ? sample.frames / sample.fps : 0;
  link.replaceChildren(
    el(
      "div",
      { class: "stage" },
      picture(sample),
      sample.state !== "committed" && stateOf(sample),
      sample.state === "committed" && !posterOf(sample) && el("span", { class: "state", text: "No poster" }),
      sample.videos > 1 && el("span", { class: "badge left", text: `Video ${sample.video + 1} of ${sample.videos}` }),
      sample.flags.length > 0 && el("span", { class: "badge flag", text: sample.flags.join(", ") }),
      seconds > 0 &&
        sample.state === "committed" &&
        el("span", { class: "badge time", text: `${significant(seconds, 2)} s` }),
    ),
    el(
      "div",
      { class: "text" },
      el(
        "p",
        { class: "id" },
        el("span", { dir: "auto", text: sample.id }),
        el("span", { text: sample.bytes ? size(sample.bytes) : "" }),
      ),
      el("p", { class: "prompt", dir: "auto", text: sample.prompt }),
      el(
        "p",
        { class: "chips" },
        chipsOf(sample).map((chip) => el("span", { text: chip })),
      ),
    ),
  );
}

// Plays one video on a card: that under the pointer, or else the one with the keyboard focus.
const preview = {
  stage: null,
  timer: 0,
  start(stage, sample) {
    this.stop();
    if (!sample?.file || isImage(sample) || stillWanted.matches) return;
    this.stage = stage;
    this.timer = setTimeout(() => this.play(stage, sample), HOVER_MS);
  },
  play(stage, sample) {
    const video = el("video", {
      class: "preview",
      preload: "none",
      playsinline: true,
      loop: true,
      tabindex: "-1",
      "aria-hidden": "true",
    });
    video.muted = true;
    video.src = sample.file;
    video.addEventListener("playing", () => video.classList.add("ready"));
    stage.append(video);
    video.play().catch(() => {});
  },
  stop() {
    clearTimeout(this.timer);
    for (const video of this.stage?.querySelectorAll("video") ?? []) discard(video);
    this.stage = null;
  },
};

// Remove a video. Without a source, the browser also ends its download.
function discard(video) {
  video.pause();
  video.removeAttribute("src");
  video.load();
  video.remove();
}
