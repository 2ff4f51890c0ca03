/** The heat strip: one row a layer, one column a position, lit where the indexer selected. */

const BAND = 8; // CSS pixels above the rows, for the mark

/** Resolve a selection's layers to [{positions, source}], source set where a layer shares. */
export function rowsOf(selection) {
  if (selection.layers === "all") {
    return [{ positions: Array.from({ length: selection.num_keys }, (_, i) => i) }];
  }
  return selection.layers.map((layer) =>
    Array.isArray(layer)
      ? { positions: layer }
      : { positions: selection.layers[layer], source: layer },
  );
}

export class Strip {
  #canvas;
  #labels;
  #rows = [];
  #sets = []; // the rows' positions as sets
  #all = false;
  #columns = 0;
  #promptLength = 0;
  #marks = []; // [first, last] positions
  #cursor = null; // {row, position}
  #onPoint;

  /** onPoint({position, row, selected, layers}) is told which cell is pointed at, or null. */
  constructor(canvas, labels, onPoint) {
    this.#canvas = canvas;
    this.#labels = labels;
    this.#onPoint = onPoint;
    canvas.addEventListener("mousemove", (event) => this.#point(event));
    canvas.addEventListener("mouseleave", () => this.#setCursor(null));
    canvas.addEventListener("keydown", (event) => this.#move(event));
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** columns: positions from left to right, the first promptLength of them the prompt's. */
  show(selection, columns, promptLength) {
    this.#rows = rowsOf(selection);
    this.#sets = this.#rows.map((row) => new Set(row.positions));
    this.#all = selection.layers === "all";
    [this.#columns, this.#promptLength] = [columns, promptLength];
    this.#canvas.style.height = `${BAND + this.#rows.length * this.#rowHeight}px`;
    this.#label();
    this.#draw();
    this.#tell();
  }

  /** Bracket these [first, last] ranges of positions. */
  mark(ranges) {
    this.#marks = ranges;
    this.#draw();
  }

  get #rowHeight() {
    return Math.max(5, Math.min(20, Math.floor(480 / this.#rows.length)));
  }

  #label() {
    this.#labels.style.paddingTop = `${BAND}px`;
    const legible = this.#rowHeight >= 11;
    this.#labels.replaceChildren(
      ...this.#rows.map(({ source }, layer) => {
        const div = document.createElement("div");
        div.style.height = `${this.#rowHeight}px`;
        if (source !== undefined) div.className = "shared";
        const name = source === undefined ? `layer ${layer}` : `layer ${layer} = ${source}`;
        if (legible) div.textContent = this.#all ? "every layer" : name;
        return div;
      }),
    );
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width || !this.#columns) return;
    const ratio = window.devicePixelRatio;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.#canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    const x = (position) => (position * width) / this.#columns;
    this.#rows.forEach((row, layer) => {
      const [top, deep] = [BAND + layer * this.#rowHeight, this.#rowHeight - 1];
      context.fillStyle = color("--panel");
      context.fillRect(0, top, width, deep);
      context.fillStyle = color(row.source === undefined ? "--hot" : "--shared");
      for (const [from, to, share] of bins(row.positions, this.#columns, width * ratio)) {
        context.globalAlpha = this.#all ? 0.35 * share : 0.25 + 0.75 * share;
        context.fillRect(x(from), top, Math.max(x(to) - x(from), 1 / ratio), deep);
      }
      context.globalAlpha = 1;
    });
    context.fillStyle = color("--soft");
    context.fillRect(x(this.#promptLength), 0, 1, height);
    context.fillStyle = color("--marked");
    for (const [first, last] of this.#marks) {
      context.fillRect(x(first), 0, Math.max(x(last + 1) - x(first), 2), BAND - 3);
    }
    if (this.#cursor) this.#outline(context, x, color("--accent"));
  }

  #outline(context, x, color) {
    const { position, row } = this.#cursor;
    const top = BAND + row * this.#rowHeight;
    context.strokeStyle = color;
    context.lineWidth = 1.5;
    const wide = Math.max(x(position + 1) - x(position), 3);
    context.strokeRect(x(position), top - 0.5, wide, this.#rowHeight);
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    const position = Math.floor(((event.clientX - box.left) / box.width) * this.#columns);
    const row = Math.floor((event.clientY - box.top - BAND) / this.#rowHeight);
    this.#setCursor({ position, row });
  }

  #move(event) {
    const step = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, -1],
      ArrowDown: [0, 1],
    }[event.key];
    if (!step) return;
    event.preventDefault();
    const { position, row } = this.#cursor ?? { position: -1, row: 0 };
    this.#setCursor({ position: position + step[0], row: row + step[1] });
  }

  #setCursor(cursor) {
    const clamp = (value, end) => Math.min(Math.max(value, 0), end - 1);
    this.#cursor = cursor && {
      position: clamp(cursor.position, this.#columns),
      row: clamp(cursor.row, this.#rows.length),
    };
    this.#draw();
    this.#tell();
  }

  #tell() {
    if (!this.#cursor || this.#cursor.row >= this.#rows.length) {
      this.#onPoint(null);
      return;
    }
    const { position, row } = this.#cursor;
    const layers = this.#sets.filter((set) => set.has(position)).length;
    const selected = this.#sets[row].has(position);
    this.#onPoint({ position, row, selected, layers, source: this.#rows[row].source });
  }
}

/** Runs of columns [from, to, share lit], one pixel or one position wide, whichever is more. */
function bins(positions, columns, pixels) {
  if (columns <= pixels) return positions.map((position) => [position, position + 1, 1]);
  const size = columns / pixels;
  const counts = new Map();
  for (const position of positions) {
    const bin = Math.floor(position / size);
    counts.set(bin, (counts.get(bin) ?? 0) + 1);
  }
  return [...counts].map(([bin, n]) => [bin * size, (bin + 1) * size, Math.min(1, n / size)]);
}
