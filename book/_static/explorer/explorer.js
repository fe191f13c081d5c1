// The scenario explorer: window.explorerData (written when the book is built) in, a view out.
// Texts of models are data: they become text nodes and are never read as HTML.
"use strict";

(() => {
  const data = window.explorerData;
  const place = (name) => document.getElementById(`explorer-${name}`);

  // --- small things ------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  const spoken = (name) => name.replaceAll("_", " ");
  const percent = (share) => (share === null ? "none" : `${(100 * share).toFixed(1)}%`);
  const interval = (result, option) =>
    result.low[option] === null
      ? "none"
      : `${percent(result.low[option])} to ${percent(result.high[option])}`;
  const share = (result, option) =>
    result.draws ? result.counts[option] / result.draws : null;
  const hueOf = (role) => ["teacher", "student", "tuned"].find((hue) => role.includes(hue)) ?? "none";
  const isParty = (scenario) => scenario.kind === "public_goods";

  // A table in a box of its own that scrolls where it has to, by keyboard too.
  function table(caption, head, rows, current = null) {
    const body = rows.map(([name, role, ...cells]) =>
      make(
        "tr",
        role === current && role ? { "aria-current": "true" } : {},
        make("th", { scope: "row" }, make("span", { class: hueOf(role ?? "") }, name)),
        ...cells.map((cell) => make("td", {}, cell)),
      ),
    );
    const columns = head.map((name) => make("th", { scope: "col" }, name));
    return make(
      "div",
      { class: "scrolls", tabindex: "0", role: "region", "aria-label": caption },
      make(
        "table",
        { class: "table" },
        make("caption", {}, caption),
        make("thead", {}, make("tr", {}, ...columns)),
        make("tbody", {}, ...body),
      ),
    );
  }

  // --- what is shown -----------------------------------------------------------------------------

  const keys = ["split", "context", "game", "arm", "model"];
  let state = {};

  const unique = (values) => [...new Set(values)];
  const scenarioOf = (view) =>
    data.scenarios.find(
      (s) => s.split === view.split && s.context === view.context && s.game === view.game,
    );

  // What can be chosen, each given what was chosen before it.
  function choicesFor(view) {
    const inSplit = data.scenarios.filter((s) => s.split === view.split);
    const here = inSplit.filter((s) => s.context === view.context);
    return {
      split: unique(data.scenarios.map((s) => s.split)).map((name) => [name, spoken(name)]),
      context: unique(inSplit.map((s) => s.context)).map((name) => [name, data.contexts[name]]),
      game: here.map((s) => [s.game, s.title]),
      arm: Object.keys(data.arms).map((name) => [
        name,
        name === "family" ? "family: a live teacher" : "published: the paper's teacher",
      ]),
      model: data.arms[view.arm]?.map((role) => [role, data.models[role].title]) ?? [],
    };
  }

  // The nearest view that exists: what does not go together falls back, from left to right.
  function settled(wanted) {
    const view = { ...wanted };
    for (const key of keys) {
      const known = choicesFor(view)[key].map(([name]) => name);
      if (!known.includes(view[key])) {
        const place = Object.values(data.arms).map((roles) => roles.indexOf(view.model));
        view[key] = known[key === "model" ? Math.max(0, ...place) : 0];
      }
    }
    return view;
  }

  const asHash = (view) => `#${new URLSearchParams(keys.map((key) => [key, view[key]]))}`;
  const fromHash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(keys.map((key) => [key, given.get(key)]).filter(([, v]) => v));
  };

  // --- controls ----------------------------------------------------------------------------------

  const labels = { split: "Split", context: "Context", game: "Game", arm: "Arm", model: "Model" };
  const selects = Object.fromEntries(
    keys.map((key) => [key, make("select", { id: `explorer-${key}`, class: "form-select" })]),
  );
  const link = make("a", {}, "Link to this view");

  function build() {
    const fields = keys.map((key) =>
      make("div", {}, make("label", { for: `explorer-${key}` }, labels[key]), selects[key]),
    );
    place("controls").append(
      make(
        "form",
        { "aria-label": "What to show" },
        make("div", { class: "controls" }, ...fields),
        make("p", {}, link),
      ),
    );
    for (const key of keys) {
      selects[key].addEventListener("change", () => show({ ...state, [key]: selects[key].value }));
    }
    place("controls").firstChild.addEventListener("submit", (event) => event.preventDefault());
  }

  function fillControls() {
    for (const [key, choices] of Object.entries(choicesFor(state))) {
      const options = choices.map(([name, title]) => make("option", { value: name }, title));
      selects[key].replaceChildren(...options);
      selects[key].value = state[key];
    }
    link.setAttribute("href", asHash(state));
  }

  // --- what the models chose ---------------------------------------------------------------------

  // The rows of chart and table: the arm's models, then the paper's.
  function rowsOf(scenario) {
    const ours = data.arms[state.arm]
      .filter((role) => scenario.results[role])
      .map((role) => ({
        role,
        title: data.models[role].title,
        label: data.models[role].title.replace(/ \(.*/, ""), // the arm is chosen above
        card: data.models[role].card,
        colour: data.models[role].colour,
        open: data.models[role].published,
        ...scenario.results[role],
      }));
    const theirs = ["teacher", "student", "tuned"]
      .filter((role) => scenario.published[role])
      .filter((role) => state.arm === "family" || role !== "teacher") // there it is a row already
      .map((role) => ({
        role: null,
        hue: role,
        title: data.paper[role].title,
        label: `Paper: ${role}`,
        card: "published",
        colour: data.paper[role].colour,
        open: true,
        ...scenario.published[role],
      }));
    return [...ours, ...theirs];
  }

  function inWords(row, scenario) {
    const unread = row.unread ? `, ${row.unread} more without a readable choice` : "";
    if (isParty(scenario)) {
      const error = row.se === null ? "" : ` (standard error ${row.se.toFixed(2)})`;
      return `${row.title}: ${row.mean.toFixed(2)} dollars on average${error}, ${row.draws} draws${unread}.`;
    }
    const exact = row.exact ? `; exact probability ${percent(row.exact.C)}` : "";
    return (
      `${row.title}: C in ${row.counts.C} of ${row.draws} draws, ${percent(share(row, "C"))} ` +
      `(95% interval ${interval(row, "C")})${exact}${unread}.`
    );
  }

  function showSummary(scenario, rows) {
    const where = `${scenario.title}, ${data.contexts[scenario.context]}, ${spoken(scenario.split)}; ${state.arm} arm.`;
    const missing = data.arms[state.arm].filter((role) => !scenario.results[role]);
    const lines = rows.map((row) => make("li", {}, inWords(row, scenario)));
    for (const role of missing) {
      lines.push(make("li", {}, `${data.models[role].title}: not in the ledger of this run.`));
    }
    place("summary").replaceChildren(
      make("p", {}, make("strong", {}, where)),
      make("ul", {}, ...lines),
    );
  }

  function sharesChart(scenario, rows, width) {
    const mixed = scenario.theory.mixed;
    const text = { fill: "currentColor" };
    return Plot.plot({
      width,
      height: 72 + 34 * rows.length,
      marginBottom: 42, // below the ticks, which are larger than the library's
      marginLeft: 128,
      marginRight: 18,
      x: { domain: [0, 1], tickFormat: "%", ticks: 5, label: "share of C", grid: true },
      y: { domain: rows.map((row) => row.label), label: null, tickSize: 0 },
      marks: [
        mixed === null ? null : Plot.ruleX([mixed], { stroke: "currentColor", strokeDasharray: "4 4" }),
        mixed === null
          ? null
          : Plot.text([mixed], { x: (d) => d, text: () => "mixed equilibrium", frameAnchor: "top", dy: -12, textAnchor: mixed > 0.7 ? "end" : "start", ...text }),
        Plot.ruleY(rows, {
          y: "label",
          x1: (row) => row.low.C,
          x2: (row) => row.high.C,
          stroke: "currentColor",
          strokeWidth: (row) => (row.role === state.model ? 3 : 1.5),
        }),
        Plot.dot(rows, {
          y: "label",
          x: (row) => share(row, "C"),
          r: (row) => (row.role === state.model ? 8 : 6),
          fill: (row) => (row.open ? "var(--pst-color-background)" : row.colour),
          stroke: (row) => (row.open ? row.colour : "currentColor"),
          strokeWidth: (row) => (row.open ? 3 : 1),
        }),
        Plot.dot(rows.filter((row) => row.exact), {
          y: "label",
          x: (row) => row.exact.C,
          symbol: "diamond",
          r: 4,
          dy: 11,
          fill: (row) => row.colour,
          stroke: "currentColor",
        }),
      ],
    });
  }

  function contributionsChart(scenario, rows, width) {
    const options = Object.keys(rows[0].counts);
    const bars = rows.flatMap((row) =>
      options.map((option) => ({
        ...row,
        option,
        part: share(row, option),
        from: row.low[option],
        to: row.high[option],
        truly: row.exact ? row.exact[option] : null,
      })),
    );
    return Plot.plot({
      width,
      height: 62 + 96 * rows.length,
      marginBottom: 42,
      marginLeft: 44,
      marginRight: 10,
      x: { domain: options, label: "dollars put into the fund", type: "band" },
      y: { domain: [0, 1.2], ticks: [0, 0.5, 1], tickFormat: "%", label: "share of draws", grid: true },
      fy: { domain: rows.map((row) => row.label), axis: null },
      marks: [
        Plot.barY(bars, {
          x: "option",
          y: "part",
          fy: "label",
          fill: (bar) => (bar.open ? "var(--pst-color-background)" : bar.colour),
          stroke: (bar) => (bar.open ? bar.colour : "currentColor"),
          strokeWidth: (bar) => (bar.open ? 2 : 0.5),
        }),
        Plot.ruleX(bars, { x: "option", y1: "from", y2: "to", fy: "label", stroke: "currentColor" }),
        Plot.dot(bars.filter((bar) => bar.truly !== null), {
          x: "option",
          y: "truly",
          fy: "label",
          symbol: "diamond",
          r: 4,
          fill: (bar) => bar.colour,
          stroke: "currentColor",
        }),
        Plot.text(rows, { fy: "label", text: "label", frameAnchor: "top-right", fill: "currentColor", fontWeight: "bold" }),
        Plot.ruleY([0], { stroke: "currentColor" }),
      ],
    });
  }

  const counted = (number) => (number === undefined ? "" : String(number));
  const coverage = (row) => (row.coverage === undefined ? "" : percent(row.coverage));

  function choicesTable(scenario, rows) {
    const caption = `Choices in ${scenario.name}`;
    const sign = (row) => [row.title, row.role ?? row.hue];
    if (isParty(scenario)) {
      const options = Object.keys(rows[0].counts);
      return table(
        caption,
        ["model", "card", "draws", "not readable", "mean", "s.e.", ...options.map((o) => `${o} $`), "coverage"],
        rows.map((row) => [
          ...sign(row),
          row.card,
          counted(row.draws),
          counted(row.unread),
          row.mean.toFixed(2),
          row.se === null ? "none" : row.se.toFixed(2),
          ...options.map((o) => `${row.counts[o]} (${interval(row, o)})` + (row.exact ? `; exact ${percent(row.exact[o])}` : "")),
          coverage(row),
        ]),
        state.model,
      );
    }
    return table(
      caption,
      ["model", "card", "draws", "C", "D", "not readable", "share of C", "95% interval", "exact", "coverage"],
      rows.map((row) => [
        ...sign(row),
        row.card,
        counted(row.draws),
        counted(row.counts.C),
        counted(row.counts.D),
        counted(row.unread),
        percent(share(row, "C")),
        interval(row, "C"),
        row.exact ? percent(row.exact.C) : "",
        coverage(row),
      ]),
      state.model,
    );
  }

  function showChoices(scenario, rows) {
    if (!rows.length) {
      place("choices").replaceChildren(make("p", {}, "The ledger of this run holds no choices here."));
      return;
    }
    const width = Math.max(280, Math.min(720, place("choices").clientWidth || 600));
    const chart = (isParty(scenario) ? contributionsChart : sharesChart)(scenario, rows, width);
    const svg = chart.matches("svg") ? chart : chart.querySelector("svg");
    for (const group of svg.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", rows.map((row) => inWords(row, scenario)).join(" "));
    place("choices").replaceChildren(
      make(
        "figure",
        {},
        chart,
        make(
          "figcaption",
          {},
          `Filled: ${data.run.label} (profile ${data.run.profile}, temperature ${data.run.temperature}); ` +
            "open: published. Lines: 95% Wilson intervals; diamonds: exact probabilities at the run's " +
            "temperature, which have no sampling error" +
            (isParty(scenario) || scenario.theory.mixed === null ? "." : "; dashed: mixed equilibrium."),
        ),
      ),
      choicesTable(scenario, rows),
      make(
        "p",
        {},
        "Coverage is the probability that the model gives to the options at all; answers without a " +
          "readable choice are counted and are no part of a share.",
      ),
    );
  }

  // --- the game ----------------------------------------------------------------------------------

  const pair = (name) => `(${name[0]}, ${name[1]})`;
  const pairs = (names) => (names.length ? names.map(pair).join(" and ") : "none");

  function matrix(scenario) {
    const { R, S, T, P } = scenario.theory.payoffs;
    const points = { CC: [R, R], CD: [S, T], DC: [T, S], DD: [P, P] };
    const cell = (name) => {
      const nash = scenario.theory.nash.includes(name);
      return make(
        "td",
        { class: nash ? "nash" : null },
        points[name].join(", "),
        ...(nash ? [make("br"), make("span", { class: "tag" }, "equilibrium")] : []),
      );
    };
    const row = (mine) =>
      make("tr", {}, make("th", { scope: "row" }, `you play ${mine}`), cell(`${mine}C`), cell(`${mine}D`));
    return make(
      "table",
      { class: "table payoffs" },
      make("caption", {}, "Points: yours, then your coplayer's"),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          make("td"),
          ...["C", "D"].map((theirs) => make("th", { scope: "col" }, `coplayer plays ${theirs}`)),
        ),
      ),
      make("tbody", {}, row("C"), row("D")),
    );
  }

  function showGame(scenario) {
    const theory = scenario.theory;
    if (isParty(scenario)) {
      const half = theory.endowment / 2;
      const given = [0, half, theory.endowment];
      place("payoffs").replaceChildren(
        table(
          "Dollars to you, by what you put in and what each of the others puts in",
          ["you put in", ...given.map((dollars) => `each of the others ${dollars}`)],
          given.map((dollars, i) => [`${dollars}`, null, ...theory.payoffs[i].map((x) => x.toFixed(2))]),
        ),
        make(
          "p",
          {},
          `${theory.players} players with ${theory.endowment} dollars each; the fund is multiplied by ` +
            `${theory.multiplier} and shared equally, so a dollar in it brings ${theory.mpcr} to each ` +
            `player. Equilibrium: everybody puts in ${theory.nash}. Best for the group: everybody ` +
            `puts in ${theory.optimum}.`,
        ),
      );
      return;
    }
    const mixed =
      theory.mixed === null
        ? "There is no equilibrium in properly mixed strategies."
        : `In the mixed equilibrium each plays C with probability ${percent(theory.mixed)}.`;
    const dominant = theory.dominant
      ? `${theory.dominant} is better whatever the coplayer does.`
      : "No choice is better whatever the coplayer does.";
    place("payoffs").replaceChildren(
      make("div", { class: "scrolls" }, matrix(scenario)),
      make(
        "p",
        {},
        `${scenario.title}: ${theory.order}. ${dominant} Pure equilibria: ${pairs(theory.nash)}. ` +
          `${mixed} Most points together: ${pairs(theory.welfare)}.`,
      ),
    );
  }

  // --- prompt, motivations, paper ----------------------------------------------------------------

  const speakers = {
    system: "System: the context",
    human: "User: the game and the question",
    ai: "Assistant: how every answer starts",
  };

  function showPrompt(scenario) {
    const model = data.models[state.model];
    if (model.published) {
      place("prompt").replaceChildren(
        make(
          "p",
          {},
          `${model.card} answers with the counts that the paper published; it was asked in the authors' ` +
            "own words, and this run asks it nothing. Choose another model to see its prompt.",
        ),
      );
      return;
    }
    const prompt = scenario.prompts[model.answer];
    const split = scenario.split === "scaled_games" ? " --split scaled_games" : "";
    const command =
      `tom show ${scenario.context}/${scenario.game}${split} --answer ${model.answer} ` +
      `--profile ${data.run.profile}`;
    const said = prompt.messages.flatMap(([speaker, text]) => [
      make("h3", {}, speakers[speaker] ?? speaker),
      make("pre", { "data-speaker": speaker }, data.texts[text]),
    ]);
    place("prompt").replaceChildren(
      make(
        "p",
        {},
        `As ${model.card} (${model.title.toLowerCase()}) gets it, answer form ${model.answer}; prompt ` +
          `${prompt.id}. The same in a terminal: `,
        make("code", {}, command),
      ),
      ...said,
    );
  }

  function showMotivations(scenario) {
    const said = scenario.motivations;
    if (!said) {
      const why =
        scenario.split === "in_sample"
          ? "The ledger of this run holds no motivations here."
          : "The teacher gave motivations in the training scenarios only (split “in sample”).";
      place("motivations").replaceChildren(make("p", {}, why));
      return;
    }
    place("motivations").replaceChildren(
      make(
        "p",
        {},
        `The first ${said.shown.length} of ${said.given} motivations, from ${said.asked} draws of ` +
          `${data.models.teacher.card}, the family arm's teacher` +
          (state.arm === "family" ? "; its student was tuned on these answers" : "") +
          ". They are shown as the model wrote them and may be wrong about the game.",
      ),
      make(
        "ul",
        { class: "said" },
        ...said.shown.map(([choice, text]) =>
          make("li", {}, make("strong", {}, `${choice ?? "no choice"}: `), make("q", { dir: "auto" }, text)),
        ),
      ),
    );
  }

  function showPaper(scenario) {
    const roles = Object.keys(data.paper).filter((role) => scenario.published[role]);
    if (!roles.length) {
      place("paper").replaceChildren(make("p", {}, "The paper has no figures for this scenario."));
      return;
    }
    const party = isParty(scenario);
    const rows = roles.map((role) => {
      const result = scenario.published[role];
      const numbers = party
        ? [result.mean.toFixed(2), result.se === null ? "none" : result.se.toFixed(2)]
        : [result.counts.C, result.counts.D, percent(share(result, "C")), interval(result, "C")];
      return [data.paper[role].title, role, String(result.draws), ...numbers.map(String)];
    });
    const head = party ? ["mean dollars", "s.e."] : ["C", "D", "share of C", "95% interval"];
    place("paper").replaceChildren(
      table(`Published counts for ${scenario.name}`, ["model", "draws", ...head], rows),
    );
  }

  // --- from one view to the next -----------------------------------------------------------------

  function draw() {
    const scenario = scenarioOf(state);
    showChoices(scenario, rowsOf(scenario));
  }

  function show(wanted, remember = true) {
    state = settled(wanted);
    const scenario = scenarioOf(state);
    fillControls();
    showSummary(scenario, rowsOf(scenario));
    draw();
    showGame(scenario);
    showPrompt(scenario);
    showMotivations(scenario);
    showPaper(scenario);
    if (remember) location.hash = asHash(state);
  }

  if (!data || !data.scenarios.length) {
    place("summary").textContent = "This book was built without a run to show.";
    return;
  }
  build();
  show(fromHash(), false);
  addEventListener("hashchange", () => {
    if (location.hash.includes("=") && location.hash !== asHash(state)) show(fromHash(), false);
  });
  let width = place("choices").clientWidth;
  new ResizeObserver(() => {
    if (place("choices").clientWidth !== width) {
      width = place("choices").clientWidth;
      draw();
    }
  }).observe(place("choices"));
})();
