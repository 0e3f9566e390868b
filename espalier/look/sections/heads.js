// Every head as a small map; a chosen head with its tokens: choose one to see where it looks.
(() => {
  const data = JSON.parse(document.getElementById("maps").textContent);
  const root = document.getElementById("heads");
  const [kinds, overview, one] = [".kinds", ".overview", ".one"].map((name) => root.querySelector(name));
  const names = { norms: "what arrives", probabilities: "probabilities", rollout: "rollout" };
  let kind = "norms", layer = 0, head = 0, token = data.tokens.length - 1;

  const element = (name, text, parent) => {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const draw = (canvas, map) => {
    const size = map.length, context = canvas.getContext("2d");
    canvas.width = canvas.height = size;
    const image = context.createImageData(size, size);
    for (let row = 0; row < size; row++)
      for (let column = 0; column < size; column++) {
        const at = 4 * (row * size + column);
        image.data.set([27, 138, 90, map[row][column]], at);
      }
    context.putImageData(image, 0, 0);
  };
  const showOne = () => {
    const map = data.maps[kind][layer][head], row = map[token], most = Math.max(1, ...row);
    one.hidden = false;
    one.replaceChildren();
    const title = kind === "rollout" ? "All layers" : `Layer ${layer + 1}, head ${head + 1}`;
    element("h3", title, one);
    element("p", "The chosen token looks at the marked ones.", one);
    const lines = element("p", "", one);
    lines.className = "lines";
    data.tokens.forEach((text, at) => {
      const word = element("button", text.trim() || "␣", lines);
      word.style.background = `color-mix(in srgb, #1b8a5a ${(100 * row[at]) / most}%, transparent)`;
      word.setAttribute("aria-pressed", at === token);
      word.title = `${Math.round((100 * row[at]) / most)} % of the most`;
      word.onclick = () => {
        token = at;
        showOne();
        one.querySelectorAll(".lines button")[at].focus();
      };
    });
    const place = element("div", "", one);
    place.className = "map";
    draw(element("canvas", "", place), map);
    overview.querySelectorAll("button").forEach((button, at) => {
      const [a, b] = [Math.floor(at / data.maps[kind][0].length), at % data.maps[kind][0].length];
      button.setAttribute("aria-pressed", a === layer && b === head);
    });
  };
  const showAll = () => {
    const layers = data.maps[kind];
    [layer, head] = [Math.min(layer, layers.length - 1), Math.min(head, layers[0].length - 1)];
    overview.replaceChildren();
    overview.style.gridTemplateColumns = `repeat(${layers[0].length}, minmax(0, 1fr))`;
    if (layers.length === 1) overview.style.maxWidth = "8rem";
    else overview.style.maxWidth = "";
    layers.forEach((heads, a) =>
      heads.forEach((map, b) => {
        const button = element("button", "", overview);
        button.setAttribute("aria-label", `layer ${a + 1}, head ${b + 1}`);
        draw(element("canvas", "", button), map);
        button.onclick = () => {
          [layer, head] = [a, b];
          showOne();
        };
      }),
    );
    showOne();
  };
  for (const name of Object.keys(names)) {
    const button = element("button", names[name], kinds);
    button.onclick = () => {
      kind = name;
      kinds.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", other === button));
      showAll();
    };
    button.setAttribute("aria-pressed", name === kind);
  }
  showAll();
})();
