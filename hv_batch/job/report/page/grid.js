// A grid that has elements only for the cards near the viewport, whatever the number of samples. All cards have one
// height. The grid is one stop of the Tab key: one card has tabindex 0, and the arrow keys move it.

const MIN_WIDTH = 240,
  MIN_JOINED = 190,
  GAP = 16; // pixels
const EXTRA_LINES = 1; // above and below the viewport
const PAGE = 20000; // cards; browsers limit the height of a page

class Grid {
  constructor(root, results, href) {
    this.root = root;
    this.results = results;
    this.href = href;
    this.cards = new Map(); // index in the results to element
    this.active = 0;
    this.page = 1;
    this.videos = 1; // of one prompt, in the first rows of the manifest
    this.fetchVisible = debounce(() => this.results.need(...this.visible()), 80);
    const paint = () => {
      this.frame ??= requestAnimationFrame(() => {
        this.frame = null;
        this.paint();
      });
    };
    addEventListener("scroll", paint, { passive: true });
    new ResizeObserver(() => this.layout()).observe(root);
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focusin", (event) => this.focused(event));
    root.addEventListener("focusout", () => preview.stop());
    root.addEventListener("pointerover", (event) => this.hover(event));
    root.addEventListener("pointerleave", () => preview.stop());
  }

  get from() {
    return (this.page - 1) * PAGE;
  }
  get to() {
    return Math.min(this.results.length, this.page * PAGE);
  }

  // Measure the width and the height of a card, and place all cards again.
  layout() {
    const width = this.root.clientWidth;
    if (!width) return;
    let columns = Math.max(1, Math.floor((width + GAP) / (MIN_WIDTH + GAP)));
    // The videos of one prompt follow each other; they stand side by side if a line takes a multiple of their number.
    if (this.videos > 1 && columns > this.videos && columns % this.videos && !this.results.items) {
      const more = columns + this.videos - (columns % this.videos);
      columns = (width + GAP) / more - GAP >= MIN_JOINED ? more : more - this.videos;
    }
    const card = (width - (columns - 1) * GAP) / columns;
    const probe = el("div", { class: "card probe" }, el("a", {}));
    fillCard(
      probe.firstChild,
      readSample({ key: "x", id: "x", prompt: "x", state: "committed", width: 1, height: 1, seed: 1, frames: 2 }, 0, 0),
      0,
      false,
      () => "#",
    );
    probe.style.width = `${card}px`;
    this.root.append(probe);
    const height = Math.ceil(probe.getBoundingClientRect().height);
    probe.remove();
    Object.assign(this, { columns, card, line: height + GAP, height, version: (this.version ?? 0) + 1 });
    this.root.style.height = `${Math.max(0, Math.ceil((this.to - this.from) / columns) * this.line - GAP)}px`;
    this.paint();
  }

  // The range of the cards in view; never empty, so that the Tab key finds a card also from outside of the view.
  visible(extra = 0, top = -this.root.getBoundingClientRect().top) {
    const lines = Math.ceil((this.to - this.from) / this.columns);
    const first = Math.max(0, Math.min(lines - 1, Math.floor(top / this.line) - extra));
    const last = Math.max(first + 1, Math.ceil((top + innerHeight) / this.line) + extra);
    return [Math.min(this.to, this.from + first * this.columns), Math.min(this.to, this.from + last * this.columns)];
  }

  paint() {
    if (!this.line || !this.root.clientWidth) return;
    // Everything is read before anything is written, so that the browser computes the layout once.
    const top = -this.root.getBoundingClientRect().top;
    const [from, to] = this.visible(EXTRA_LINES, top),
      [first, last] = this.visible(0, top);
    const held = this.root.contains(document.activeElement) ? document.activeElement.closest(".card") : null;
    for (const [index, card] of this.cards) {
      if ((index < from || index >= to || index >= this.to) && (card !== held || index >= this.to)) {
        if (card.contains(preview.stage)) preview.stop();
        for (const image of card.querySelectorAll("img:not(.ready)")) image.removeAttribute("src");
        card.remove();
        this.cards.delete(index);
      }
    }
    for (let index = from; index < to; index += 1) this.place(index);
    if (!held && (this.active < first || this.active >= last)) this.active = first;
    for (const [index, card] of this.cards) card.firstChild.tabIndex = index === this.active ? 0 : -1;
    this.fetchVisible();
  }

  place(index) {
    let card = this.cards.get(index);
    if (!card) {
      card = el("div", { class: "card", role: "listitem" }, el("a", { tabindex: "-1" }));
      card.index = index;
      this.cards.set(index, card);
      // The order of the elements is that of the samples, for screen readers.
      const after = [...this.root.children].find((each) => each.index > index);
      this.root.insertBefore(card, after ?? null);
    }
    const row = Math.floor((index - this.from) / this.columns),
      column = (index - this.from) % this.columns;
    this.show(card, index, column);
    if (card.version === this.version) return;
    card.version = this.version;
    card.style.transform = `translate(${column * (this.card + GAP)}px, ${row * this.line}px)`;
    card.style.width = `${this.card}px`;
    card.setAttribute("aria-posinset", index + 1);
    card.setAttribute("aria-setsize", this.results.length);
  }

  show(card, index, column) {
    const sample = this.results.sample(index);
    const next = column + 1 < this.columns && index + 1 < this.to ? this.results.sample(index + 1) : null;
    const together = (other) => Boolean(sample && other && sample.row !== null && sample.row === other.row);
    card.classList.toggle("joined", together(next));
    const shard = sample ? null : this.results.parts.at(index);
    const waiting = Boolean(shard && !this.results.parts.isComplete(shard));
    const shown = `${sample ? "" : waiting}`;
    if (card.shown === shown && sameSample(card.sample, sample)) {
      card.sample = sample;
      return;
    }
    if (card.contains(preview.stage)) preview.stop();
    Object.assign(card, { sample, shown });
    fillCard(card.firstChild, sample, index, waiting, this.href);
  }

  // The results have changed.
  update(page, toTop) {
    const last = Math.max(1, Math.ceil(this.results.length / PAGE));
    this.page = Math.min(page, last);
    if (toTop) {
      for (const card of this.cards.values()) card.remove();
      this.cards.clear();
      preview.stop();
      this.active = this.from;
    }
    this.layout();
  }

  focusCard(index) {
    this.active = Math.max(this.from, Math.min(this.to - 1, index));
    const top =
      this.root.getBoundingClientRect().top + Math.floor((this.active - this.from) / this.columns) * this.line;
    const margin = byId("views").parentElement.offsetHeight + 12;
    if (top < margin) scrollBy(0, top - margin);
    else if (top + this.height > innerHeight) scrollBy(0, top + this.height + GAP - innerHeight);
    this.paint();
    this.place(this.active);
    for (const [at, card] of this.cards) card.firstChild.tabIndex = at === this.active ? 0 : -1;
    this.cards.get(this.active).firstChild.focus({ preventScroll: true });
  }

  key(event) {
    const card = event.target.closest(".card");
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const screen = Math.max(1, Math.floor(innerHeight / this.line)) * this.columns;
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      PageUp: -screen,
      PageDown: screen,
    };
    if (event.key in steps) this.focusCard(card.index + steps[event.key]);
    else if (event.key === "Home") this.focusCard(this.from);
    else if (event.key === "End") this.focusCard(this.to - 1);
    else return;
    event.preventDefault();
  }

  focused(event) {
    const card = event.target.closest(".card");
    if (!card) return;
    this.active = card.index;
    for (const each of this.cards.values()) each.firstChild.tabIndex = each === card ? 0 : -1;
    if (event.target.matches(":focus-visible")) preview.start(card.querySelector(".stage"), card.sample);
  }

  hover(event) {
    const stage =
      event.pointerType === "mouse" ? (event.target.closest(".card")?.querySelector(".stage") ?? null) : null;
    if (stage === preview.stage) return;
    if (stage) preview.start(stage, stage.closest(".card").sample);
    else preview.stop();
  }
}

function sameSample(a, b) {
  return (
    a === b ||
    Boolean(
      a &&
      b &&
      ["at", "key", "state", "file", "poster", "message", "bytes", "videos"].every((name) => a[name] === b[name]),
    )
  );
}
