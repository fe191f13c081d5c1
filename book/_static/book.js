// Wide tables scroll in a box of their own, which the keyboard can reach.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) {
    if (table.closest(".scrolls")) continue;
    const box = document.createElement("div");
    box.className = "scrolls";
    table.replaceWith(box);
    box.append(table);
  }
  for (const box of document.querySelectorAll(".bd-article .scrolls, .bd-article pre")) {
    if (box.scrollWidth > box.clientWidth) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", "scrolls sideways");
    }
  }
});
