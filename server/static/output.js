/** The generated tokens as text that can be pointed at, and the details of one of them. */

const SHOW_MS = 100; // between looks at the newest token, however many come

export class Output {
  #box;
  #details;
  #onShow;
  #shown = -1; // index of the token whose details are on show
  #held = false; // by the mouse or the keyboard; otherwise the newest token is shown
  #timer = 0; // until the newest token is shown, if one waits for that
  tokens = [];
  length = 0; // of the text

  /** onShow(token, index) is told which token is shown. */
  constructor(box, details, onShow) {
    this.#box = box;
    this.#details = details;
    this.#onShow = onShow;
    for (const kind of ["mouseover", "focusin"]) {
      box.addEventListener(kind, (event) => this.#point(event.target));
    }
    for (const kind of ["mouseleave", "focusout"]) {
      box.addEventListener(kind, () => (this.#held = false));
    }
    box.addEventListener("keydown", (event) => this.#move(event));
  }

  clear() {
    clearTimeout(this.#timer);
    this.tokens = [];
    this.length = this.#timer = 0;
    this.#shown = -1;
    this.#held = false;
    this.#box.replaceChildren();
    this.#details.hidden = true;
  }

  /** Append {text, id, logprob?, top?, selection?}; top is [[logprob, id, text], ...]. */
  push(token) {
    const span = document.createElement("span");
    span.className = "token";
    span.role = "option";
    span.tabIndex = this.tokens.length ? -1 : 0;
    span.textContent = token.text;
    span.ariaSelected = "false";
    if (!token.text) span.ariaLabel = token.name ?? `token ${token.id}`;
    if (token.logprob !== undefined) span.style.setProperty("--p", Math.exp(token.logprob));
    this.tokens.push(token);
    this.length += token.text.length;
    const atEnd = this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight < 40;
    this.#box.append(span);
    if (atEnd) this.#box.scrollTop = this.#box.scrollHeight;
    this.#timer ||= setTimeout(() => this.flush(), SHOW_MS);
  }

  /** Show the newest token now, if nobody chose another. */
  flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#held && this.tokens.length) this.#show(this.tokens.length - 1);
  }

  #point(target) {
    if (target.className !== "token") return;
    this.#held = true;
    this.#show([...this.#box.children].indexOf(target));
  }

  #move(event) {
    const last = this.tokens.length - 1;
    const to = { ArrowLeft: this.#shown - 1, ArrowRight: this.#shown + 1, Home: 0, End: last };
    if (!(event.key in to)) return;
    event.preventDefault();
    this.#box.children[Math.min(Math.max(to[event.key], 0), last)]?.focus();
  }

  #show(index) {
    const before = this.#box.children[this.#shown];
    if (before) [before.ariaSelected, before.tabIndex] = ["false", -1];
    this.#shown = index;
    const span = this.#box.children[index];
    [span.ariaSelected, span.tabIndex] = ["true", 0];
    this.#describe(this.tokens[index], index);
    this.#onShow(this.tokens[index], index);
  }

  #describe(token, index) {
    const [title, list] = this.#details.children;
    title.textContent = `Token ${index + 1}: ${quoted(token.name ?? token.text)}, id ${token.id}`;
    this.#details.hidden = false;
    if (token.logprob === undefined) {
      list.replaceChildren();
      return;
    }
    const own = [token.logprob, token.id, token.name];
    const best = token.top ?? [];
    const entries = best.some(([, id]) => id === token.id) ? best : [...best, own];
    list.replaceChildren(...entries.map((entry) => alternative(entry, entry[1] === token.id)));
  }
}

function alternative([logprob, id, name], taken) {
  const item = document.createElement("li");
  if (taken) item.ariaCurrent = "true";
  const [text, bar, share] = ["text", "bar", "share"].map((part) => {
    const span = document.createElement("span");
    span.className = part;
    return span;
  });
  text.textContent = quoted(name ?? `id ${id}`);
  bar.style.width = `${100 * Math.exp(logprob)}%`;
  share.textContent = percent(Math.exp(logprob));
  item.append(text, bar, share);
  return item;
}

/** Text with its spaces and line ends made visible. */
export function quoted(text) {
  return JSON.stringify(text);
}

function percent(share) {
  if (share < 0.00005) return "< 0.01 %";
  return `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;
}
