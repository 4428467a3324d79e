// The facets beside the grid, and the chosen values above it.

const FACET_TITLES = { state: "State", shape: "Size", class: "Failure class", flags: "Quality flags" };
const SHOWN_VALUES = 30;
const narrow = matchMedia("(max-width: 860px)"); // as in videos.css, which hides the outer fold on wider screens
narrow.addEventListener("change", () => {
  byId("filters").firstElementChild.open = !narrow.matches;
});

function facetLabel(facet, value) {
  if (facet === "shape") return shapeLabel(value);
  return facet === "state" || value === OTHER ? humanize(value) : value || "(empty)";
}

function sortedFacets(report) {
  const known = Object.keys(FACET_TITLES).filter((facet) => report.facets.get(facet)?.size);
  const others = [...report.facets.keys()].filter((facet) => !(facet in FACET_TITLES) && report.facets.get(facet).size);
  return [...known, ...others];
}

// Draw the facets. The boxes of a refresh replace those of before, but folds and the focus stay.
function drawFilters(report, state, choose) {
  const root = byId("filters");
  const open = new Map([...root.querySelectorAll("details")].map((each) => [each.dataset.facet, each.open]));
  const focused = root.contains(document.activeElement) ? document.activeElement.id : null;
  const groups = sortedFacets(report).map((facet, number) => {
    const chosen = state.filters.get(facet) ?? new Set();
    const values = [...report.facets.get(facet)].filter(([value, n]) => n > 0 || chosen.has(value));
    const rows = values
      .slice(0, SHOWN_VALUES)
      .map(([value, n], row) => facetRow(facet, value, n, `f-${number}-${row}`, chosen, choose));
    const group = el(
      "details",
      { class: "facet", open: open.get(facet) ?? (number < 2 || chosen.size > 0) },
      el("summary", { id: `f-${number}` }, FACET_TITLES[facet] ?? humanize(facet)),
      el("div", { role: "group", "aria-label": FACET_TITLES[facet] ?? humanize(facet) }, rows),
      values.length > SHOWN_VALUES &&
        el("p", { class: "soft", text: `and ${integer(values.length - SHOWN_VALUES)} more values` }),
    );
    group.dataset.facet = facet;
    return group;
  });
  const all = el(
    "details",
    { class: "all-filters", open: !narrow.matches || open.get("") },
    el("summary", { id: "f-all", text: "Filters" }),
    groups,
  );
  all.dataset.facet = "";
  root.replaceChildren(all);
  if (focused) byId(focused)?.focus({ preventScroll: true });
}

function facetRow(facet, value, n, id, chosen, choose) {
  const box = el("input", {
    type: "checkbox",
    id,
    checked: chosen.has(value),
    change: () => choose(facet, value, box.checked),
  });
  return el(
    "label",
    { class: "value" },
    box,
    el("span", { class: "name", dir: "auto", text: facetLabel(facet, value) }),
    el("span", { class: "n", text: integer(n) }),
  );
}

// The chosen values, each with a button that takes it back.
function drawChips(state, choose, clear) {
  const chips = [...state.filters].flatMap(([facet, chosen]) =>
    [...chosen].map((value) => {
      const label = `${FACET_TITLES[facet] ?? humanize(facet)}: ${facetLabel(facet, value)}`;
      return el(
        "button",
        {
          type: "button",
          class: "chip",
          "aria-label": `Remove the filter ${label}`,
          click: () => choose(facet, value, false),
        },
        el("span", { dir: "auto", text: label }),
        el("span", { "aria-hidden": "true", text: " ×" }),
      );
    }),
  );
  if (hasFilter(state))
    chips.push(el("button", { type: "button", class: "chip clear", click: clear, text: "Clear all" }));
  byId("chips").replaceChildren(...chips);
}
