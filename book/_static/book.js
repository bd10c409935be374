// What the theme leaves unsaid to screen readers.
addEventListener("DOMContentLoaded", () => {
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

  // The arrows that unfold a chapter's pages in the table of contents have no name.
  each("li.has-children > details > summary", summary =>
    summary.setAttribute("aria-label", "pages of " + summary.closest("li").querySelector("a").textContent.trim()));

  // The parameters of a long signature stand in a list of definitions without terms.
  each("dt.sig dl, dt.sig dl > dd", part => part.setAttribute("role", "none"));

  // A bibliography is a list of entries.
  each(".citation-list > .citation", entry => entry.setAttribute("role", "listitem"));
});
