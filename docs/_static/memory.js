// What training keeps in memory: the choices of the page, computed as signadam_ext.memory does from the same forms.
"use strict";

(() => {
  const MODELS = {
    "1 million in one tensor": [1e6, 1, 1e6],
    "124 million (GPT-2 small), 148 tensors": [124439808, 148, 38597376],
    "1 billion, 150 tensors": [1e9, 150, 1e8],
    "7 billion, 290 tensors": [7e9, 290, 131072000],
    "70 billion, 723 tensors": [70e9, 723, 1050673152],
  };
  const PARTS = {
    weights: ["weights", "#4b5563"],
    residual: ["low bits or master copies", "#9ca3af"],
    moments: ["moments", "#dc2626"],
    scalars: ["scalars of each tensor", "#f59e0b"],
    gradients: ["gradients", "#93c5fd"],
  };
  const STORAGES = {
    nearest: "rounded to nearest",
    stochastic: "rounded stochastically",
    split8: "split: 8 low bits beside them",
    split16: "split: 16 low bits beside them",
    master: "fp32 master copies",
  };

  // The computation

  function formBytes(kind, numel) {
    const form = MEMORY.forms[kind];
    if (!form.packed) return (numel * form.bits) / 8;
    const runs = Math.ceil(numel / MEMORY.run);
    return (runs * MEMORY.run * form.bits) / 8 + runs * form.each_run;
  }

  /** [elements, how many such tensors]: as even as can be. */
  function tensors(parameters, count) {
    const size = Math.floor(parameters / count);
    const larger = parameters - size * count;
    return [[size + 1, larger], [size, count - larger]].filter(([, n]) => n > 0);
  }

  function bytes(choice, kept) {
    const each = tensors(choice.parameters, choice.tensors);
    const moments = kept.moments.reduce(
      (sum, kind) => sum + each.reduce((s, [numel, n]) => s + n * formBytes(kind, numel), 0), 0);
    return {
      weights: choice.parameters * kept.weights,
      residual: choice.parameters * kept.residual,
      moments,
      scalars: choice.tensors * kept.scalars,
      gradients: (kept.released ? choice.largest : choice.parameters) * kept.grad,
    };
  }

  function rows(choice) {
    const width = (dtype) => MEMORY.params[dtype].bytes;
    const found = MEMORY.optimizers[choice.optimizer];
    const state = found.states[choice.state];
    const ours = {
      ...state,
      weights: width(choice.param),
      residual: MEMORY.params[choice.param].storages[choice.storage],
      grad: width(choice.grad),
      released: choice.gradients === "released",
    };
    const result = [[`signadam_ext: ${choice.optimizer}`, bytes(choice, ours)]];
    const torch = { weights: width(choice.param), grad: width(choice.param), scalars: 4, released: false };
    const half = choice.param === "fp32" ? "fp32" : "bf16"; // of fp16 as wide
    if (choice.param !== "fp32") {
      result.push(["AdamW, fp32 master copies and moments",
        bytes(choice, { ...torch, residual: 4, moments: ["fp32", "fp32"] })]);
    }
    result.push([`AdamW in ${choice.param}`, bytes(choice, { ...torch, residual: 0, moments: [half, half] })]);
    return result;
  }

  function command(choice) {
    const found = MEMORY.optimizers[choice.optimizer];
    const words = ["signadam memory", `--params ${choice.parameters}`];
    if (choice.tensors > 1) words.push(`--tensors ${choice.tensors}`);
    words.push(`--param-dtype ${choice.param}`);
    if (choice.grad !== choice.param) words.push(`--grad-dtype ${choice.grad}`);
    if (choice.gradients === "released") words.push(`--gradients released --largest ${choice.largest}`);
    words.push(`--optimizer ${found.name}`);
    for (const [name, value] of Object.entries(found.options)) {
      if (name === "target") continue; // any has the same cost, and the command has none
      words.push(value === true ? `--${name}` : `--${name.replace("_", "-")} ${value}`);
    }
    if (choice.state !== "fp32") words.push(`--state ${choice.state}`);
    if (choice.storage !== "nearest") words.push(`--param-storage ${choice.storage}`);
    if (choice.gpus > 1) words.push(`--gpus ${choice.gpus}`);
    return words.join(" ");
  }

  // The page

  const form = document.getElementById("memory-choices");
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  function field(name, label, control) {
    control.name = name;
    control.id = `memory-${name}`;
    form.append(make("label", { htmlFor: control.id }, label, control));
    return control;
  }

  function select(name, label, choices, chosen) {
    const control = make("select");
    fill(control, choices, chosen);
    return field(name, label, control);
  }

  /** Give a list other choices; what was chosen stays where it can. */
  function fill(control, choices, chosen) {
    const before = chosen ?? control.value;
    control.replaceChildren(...Object.entries(choices).map(([value, text]) => make("option", { value }, text)));
    control.value = before in choices ? before : Object.keys(choices)[0];
  }

  const same = (names) => Object.fromEntries(names.map((name) => [name, name]));
  const number = (name, label, value) =>
    field(name, label, make("input", { type: "number", min: 1, step: 1, value, required: true }));

  const model = select("model", "Model", { ...same(Object.keys(MODELS)), own: "another" }, "7 billion, 290 tensors");
  const parameters = number("parameters", "Number of parameters", 7e9);
  const count = number("tensors", "Number of tensors", 290);
  const largest = number("largest", "Elements of the largest tensor", 131072000);
  const optimizer = select("optimizer", "Optimizer", same(Object.keys(MEMORY.optimizers)), "SignAdamPP, fixed threshold");
  const param = select("param", "Dtype of the parameters", same(Object.keys(MEMORY.params)), "bf16");
  const storage = select("storage", "Storage of the parameters", { stochastic: "" }, "stochastic");
  const state = select("state", "Storage of the moments", { int2: "int2" }, "int2");
  const grad = select("grad", "Dtype of the gradients", same(Object.keys(MEMORY.params)), "bf16");
  const gradients = select("gradients", "Gradients in memory", { all: "all at once", released: "the largest alone (released)" });
  const gpus = number("gpus", "Number of GPUs", 1);

  function chosen() {
    const whole = (control, name, most) => {
      const value = Number(control.value);
      if (!Number.isSafeInteger(value) || value < 1) throw new Error(`${name}: a whole number from 1 on`);
      if (most !== undefined && value > most) throw new Error(`${name}: at most ${most}, the number of parameters`);
      return value;
    };
    const total = whole(parameters, "Parameters");
    return {
      parameters: total,
      tensors: whole(count, "Tensors", total),
      largest: whole(largest, "Elements of the largest", total),
      gpus: whole(gpus, "GPUs"),
      optimizer: optimizer.value,
      param: param.value,
      storage: storage.value,
      state: state.value,
      grad: grad.value,
      gradients: gradients.value,
    };
  }

  const significant = (x) => String(Number(x.toPrecision(5)));

  function draw(choice) {
    const table = document.getElementById("memory-table");
    const bars = document.getElementById("memory-bars");
    const found = rows(choice);
    const sum = (part) => Object.values(part).reduce((a, b) => a + b, 0);
    const most = Math.max(...found.map(([, part]) => sum(part)));
    bars.replaceChildren(...found.map(([name, part]) => make("div", { className: "memory-bar" },
      make("span", { className: "memory-name" }, name),
      make("span", { className: "memory-stack" }, ...Object.entries(part).filter(([, n]) => n > 0).map(([key, n]) => {
        const piece = make("span", { title: `${PARTS[key][0]}: ${significant(n / choice.parameters)} bytes per parameter` });
        piece.style.width = `${(100 * n) / most}%`;
        piece.style.background = PARTS[key][1];
        return piece;
      })),
      make("span", { className: "memory-sum" }, `${significant(sum(part) / choice.parameters)} B`))),
    make("div", { className: "memory-key" }, ...Object.values(PARTS).map(([text, color]) => {
      const swatch = make("i");
      swatch.style.background = color;
      return make("span", {}, swatch, text);
    })));

    const shares = choice.gpus > 1;
    const head = ["", "bytes per parameter", "GB", "GiB", ...(shares ? [`GB on each of ${choice.gpus}`] : [])];
    const line = (name, key, nbytes, emphasis) => {
      const cells = [significant(nbytes / choice.parameters), (nbytes / 1e9).toFixed(3), (nbytes / 2 ** 30).toFixed(3),
        ...(shares ? [(nbytes / choice.gpus / 1e9).toFixed(3)] : [])].map((text) => make("td", {}, text));
      const row = make("tr", { className: emphasis ? "memory-total" : "" }, make("th", { scope: "row" }, name), ...cells);
      row.dataset.part = key;
      row.dataset.bytes = nbytes;
      return row;
    };
    const body = make("tbody");
    found.forEach(([name, part], i) => {
      const resident = sum(part) - part.gradients;
      body.append(make("tr", { className: "memory-title" }, make("th", { colSpan: head.length, scope: "rowgroup" }, name)));
      for (const [key, nbytes] of Object.entries(part)) {
        if (nbytes > 0 && key !== "gradients") body.append(line(PARTS[key][0], `${i}.${key}`, nbytes));
      }
      body.append(line("without gradients", `${i}.resident`, resident, true));
      body.append(line(PARTS.gradients[0], `${i}.gradients`, part.gradients));
      body.append(line("with gradients", `${i}.total`, sum(part), true));
    });
    table.replaceChildren(make("thead", {}, make("tr", {}, ...head.map((text) => make("th", {}, text)))), body);
    document.getElementById("memory-command").textContent = command(choice);
  }

  function update(event) {
    if (event?.target === model && model.value !== "own") {
      [parameters.value, count.value, largest.value] = MODELS[model.value];
    } else if ([parameters, count, largest].includes(event?.target)) {
      model.value = "own";
    }
    fill(state, same(Object.keys(MEMORY.optimizers[optimizer.value].states)));
    fill(storage, Object.fromEntries(
      Object.keys(MEMORY.params[param.value].storages).map((name) => [name, STORAGES[name] ?? name])));
    const error = document.getElementById("memory-error");
    try {
      draw(chosen());
      error.hidden = true;
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    }
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
