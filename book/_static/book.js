document.addEventListener("DOMContentLoaded", () => {
  const all = (selector) => document.querySelectorAll(selector);

  // Wide tables scroll in a box of their own, which the keyboard can reach.
  for (const table of all(".bd-article table")) {
    if (table.closest(".scrolls")) continue;
    const box = document.createElement("div");
    box.className = "scrolls";
    table.replaceWith(box);
    box.append(table);
  }
  for (const box of all(".bd-article .scrolls, .bd-article pre")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", "scrolls");
    }
  }

  // A button is called what is written on it, and its picture has no name of its own.
  for (const named of all(".search-button-field, details.hide summary")) {
    named.removeAttribute("aria-label");
  }
  for (const icon of all(".theme-switch")) {
    icon.removeAttribute("title");
    icon.querySelector("title")?.remove();
    icon.setAttribute("aria-hidden", "true");
  }
  // A list of references holds items.
  for (const entry of all(".citation-list > .citation")) entry.setAttribute("role", "listitem");
});
