"use strict";
// Sorting, filtering, choosing a weight, and the theme. Without it the page can be read all the same.
{
  const by = (id) => document.getElementById(id);
  const table = by("table"), body = table.tBodies[0], rows = [...body.rows];

  // A head sorts up, then down, then puts the rows back as they were. What has no number comes last.
  const heads = [...table.tHead.rows[0].cells];
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("number");
    head.firstElementChild.addEventListener("click", () => {
      const order = next[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
      };
      body.append(...(order === "none" ? rows : [...rows].sort(compare)));
    });
  });

  // All words must be in the row, in any order and case.
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
  by("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += !row.hidden;
    });
    by("count").textContent = shown === rows.length ? `${shown} sites` : `${shown} of ${rows.length} sites`;
  });
  by("tools").hidden = false;

  if (by("looks")) {
    const looks = JSON.parse(by("looks").textContent), site = by("site");
    const make = (tag, values) => Object.assign(document.createElement(tag), values);
    const show = (index) => {
      site.selectedIndex = (index + looks.length) % looks.length;
      const look = looks[site.selectedIndex];
      by("which").textContent = look.about;
      by("pictures").replaceChildren(...look.pictures.map((one) => {
        const figure = make("figure", { className: one.kind }), caption = make("figcaption", {});
        caption.append(make("b", { textContent: one.title }));
        const image = make("img", { src: one.png, width: one.width, height: one.height, alt: one.words });
        image.style.setProperty("--ratio", one.width / one.height);
        figure.append(caption, image, make("p", { className: "note", textContent: one.words }));
        return figure;
      }));
    };
    site.addEventListener("change", () => show(site.selectedIndex));
    by("previous").addEventListener("click", () => show(site.selectedIndex - 1));
    by("next").addEventListener("click", () => show(site.selectedIndex + 1));
    by("chooser").hidden = false;
    show(0);
    // The name of a site in the table leads to its pictures.
    const places = new Map(looks.map((look, i) => [look.name, i]));
    rows.forEach((row) => {
      const head = row.cells[0], name = head.dataset.value;
      if (!places.has(name)) return;
      const link = make("a", { href: "#inside", textContent: head.textContent });
      link.addEventListener("click", () => show(places.get(name)));
      head.replaceChildren(link);
    });
  }

  // The theme is the system's until it is chosen here.
  const theme = by("theme"), system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const say = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`); };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; say(); });
  system.addEventListener("change", say);
  theme.hidden = false;
  say();
}
