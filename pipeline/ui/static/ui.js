"use strict";
// The script of `python -m pipeline ui`: keys in examples, the chat, and the output of a job. Pages work without it but for the chat.

const csrf = document.querySelector("meta[name=csrf]").content;

async function sent(address, body, type) {
  const options = body === undefined ? {} : { method: "POST", body, headers: { "Content-Type": type, "X-CSRF-Token": csrf } };
  options.headers = { ...options.headers, Accept: "application/json" };
  let reply;
  try {
    reply = await fetch(address, options);
  } catch {
    throw new Error("The page's server does not answer; is `python -m pipeline ui` still running?");
  }
  const found = await reply.json().catch(() => ({ error: `The server answered with status ${reply.status}.` }));
  if (!reply.ok) throw new Error(found.error);
  return found;
}

// Examples: j and k go from card to card, n and p from page to page.
function follow(rel) {
  const link = document.querySelector(`a[rel=${rel}]`);
  if (link) location.assign(link.href);
}

function step(by) {
  const cards = [...document.querySelectorAll("main .card")];
  const at = cards.indexOf(document.activeElement.closest(".card"));
  const next = at < 0 ? (by > 0 ? 0 : -1) : at + by;
  if (cards[next]) cards[next].focus();
  else if (next >= cards.length) follow("next");
  else follow("prev");
}

if (document.querySelector("#examples")) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const actions = {
      j: () => step(1),
      k: () => step(-1),
      n: () => follow("next"),
      p: () => follow("prev"),
      ArrowRight: () => follow("next"),
      ArrowLeft: () => follow("prev"),
      "/": () => document.querySelector("input[type=search]").focus(),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });
}

// The chat.
const form = document.querySelector("#chat");
if (form) {
  const [file, preview, clear, busy, ask] = ["file", "preview", "clear", "busy", "ask"].map((id) => document.getElementById(id));
  let picture = form.dataset.picture;

  const show = (name) => {
    picture = name;
    preview.hidden = clear.hidden = !name;
    if (name) preview.src = `/sent/${name}`;
    else preview.removeAttribute("src");
  };

  const working = async (words, work) => {
    busy.className = "";
    busy.textContent = words;
    ask.disabled = true;
    try {
      await work();
      busy.textContent = "";
    } catch (error) {
      busy.className = "fault";
      busy.textContent = error.message;
    } finally {
      ask.disabled = false;
    }
  };

  file.addEventListener("change", () => {
    const chosen = file.files[0];
    if (!chosen) return;
    show(""); // a question must not be asked of the picture before, where this one is refused
    working("sending the picture ...", async () => {
      const most = Number(form.dataset.mostBytes);
      try {
        if (chosen.size > most) throw new Error(`The picture has ${(chosen.size / 2 ** 20).toFixed(1)} MiB; expected at most ${most / 2 ** 20}.`);
        show((await sent("/sent", chosen, chosen.type || "application/octet-stream")).picture);
      } catch (error) {
        file.value = "";
        throw error;
      }
    });
  });
  clear.addEventListener("click", () => {
    file.value = "";
    show("");
  });

  const cell = (row, text, name) => {
    const made = document.createElement(name ? "th" : "td");
    made.textContent = text;
    if (name) made.scope = "row";
    row.append(made);
    return made;
  };

  const answered = (question, asked, task, found) => {
    const card = document.querySelector("#answer").content.cloneNode(true);
    card.querySelector(".question").textContent = question;
    card.querySelector(".said").textContent = found.answer || "(nothing)";
    card.querySelector(".how").textContent = task ? `(${task} chosen by hand)` : "(as routed)";
    card.querySelector(".strange").hidden = !found.unfamiliar;
    const image = card.querySelector(".picture");
    if (asked) {
      image.hidden = false;
      image.querySelector("img").src = `/sent/${asked}`;
      if (found.frames.length) {
        const make = (kind) => document.createElementNS("http://www.w3.org/2000/svg", kind);
        const boxes = make("svg");
        for (const [name, value] of [["class", "boxes"], ["viewBox", "0 0 100 100"], ["preserveAspectRatio", "none"]]) boxes.setAttribute(name, value);
        for (const frame of found.frames) {
          const box = make("rect");
          for (const [name, value] of [["class", frame.kind], ["x", frame.left], ["y", frame.top], ["width", frame.width], ["height", frame.height], ["fill", "none"], ["vector-effect", "non-scaling-stroke"]]) box.setAttribute(name, value);
          boxes.append(box);
        }
        image.append(boxes);
      }
    }
    const rows = card.querySelector("tbody");
    for (const one of found.sets) {
      const row = document.createElement("tr");
      if (one.inserted) row.className = "inserted";
      cell(row, one.name, true);
      cell(row, one.similarity === null ? "–" : one.similarity.toFixed(3)).className = "number";
      cell(row, one.probability === null ? "–" : `${(100 * one.probability).toFixed(1)} %`).className = "number";
      cell(row, one.inserted ? `✓${one.weight === null ? "" : ` × ${one.weight.toFixed(2)}`}` : "");
      rows.append(row);
    }
    document.querySelector("#answers").prepend(card);
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = document.querySelector("#question").value, task = document.querySelector("#task").value, asked = picture;
    working("answering; the first question loads the model ...", async () => {
      answered(question, asked, task, await sent(location.pathname, JSON.stringify({ question, picture: asked, task }), "application/json"));
    });
  });
  document.querySelector("#question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!ask.disabled) form.requestSubmit();
    }
  });
}

// The output of a job: what is new each second, until it ends.
const output = document.querySelector("#output");
if (output) {
  let next = Number(output.dataset.next);
  const poll = async () => {
    try {
      const found = await sent(`/job/${output.dataset.job}?from=${next}`);
      const below = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
      if (found.text) output.append(found.text);
      if (below) output.scrollTop = output.scrollHeight;
      const more = found.next > next;
      next = found.next;
      if (found.state === "running" || more) setTimeout(poll, more ? 300 : 1000);
      else if (output.dataset.state === "running") location.reload();
    } catch {
      setTimeout(poll, 3000);
    }
  };
  output.scrollTop = output.scrollHeight;
  poll();
}
