// The map of experts: a band a layer, a cell an expert; colour by place, strength by recent use.

const HUES = { device: 45, arena: 174, remote: 275, disk: 215 };
const LEVELS = 16;
const MOST = 34, LEAST = 3, GUTTER = 26; // CSS pixels: sides of cells, width of the layers' numbers
const dark = matchMedia("(prefers-color-scheme: dark)");

// Colours of a place from idle to busy: hosts of one tier are neighbours on the colour wheel.
function shades(place, index) {
  const isDisk = place.tier === "disk";
  const turn = (index % 2 ? 1 : -1) * Math.ceil(index / 2) * 24;
  return Array.from({ length: LEVELS }, (_, level) => {
    const use = level / (LEVELS - 1);
    const saturation = isDisk ? 8 : 42 + 48 * use;
    const lightness = dark.matches ? (isDisk ? 18 : 24) + (isDisk ? 52 : 46) * use : (isDisk ? 88 : 80) - 48 * use;
    return `hsl(${(HUES[place.tier] ?? 0) + turn} ${saturation}% ${lightness}%)`;
  });
}

export function paletteOf(places) {
  const seen = {};
  return places.map((place) => shades(place, (seen[place.tier] = (seen[place.tier] ?? -1) + 1)));
}

// The cell's side, and columns, for which all layers fit best into a frame.
function layOut(numLayers, numExperts, width, height) {
  const whole = (side) => Math.floor(side * devicePixelRatio) / devicePixelRatio; // pixels of the screen
  let best = { side: 0, columns: numExperts };
  for (let rows = 1; rows <= numExperts; rows++) {
    const columns = Math.ceil(numExperts / rows);
    const side = whole(Math.min(MOST, width / columns, (height / numLayers - 2) / rows));
    if (side > best.side) best = { side, columns };
  }
  if (best.side >= LEAST) return best;
  const rows = Math.ceil((numExperts * LEAST) / Math.max(width, LEAST));
  const columns = Math.ceil(numExperts / rows);
  return { side: Math.max(LEAST, whole(width / columns)), columns };
}

export class ExpertMap {
  constructor(canvas, output) {
    this.canvas = canvas;
    this.output = output;
    this.frame = canvas.parentElement;
    this.selected = null;
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("pointermove", (event) => this.select(this.cellAt(event)));
    canvas.addEventListener("pointerdown", (event) => this.select(this.cellAt(event)));
    canvas.addEventListener("focus", () => this.state && this.select(this.selected ?? [0, 0]));
    canvas.addEventListener("blur", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.frame);
    dark.addEventListener("change", () => this.draw());
  }

  // `layers`: of each layer {place, recent}, Uint8Array with a byte an expert.
  show(places, layers) {
    this.state = { places, layers };
    this.draw();
    if (this.selected) this.tell();
  }

  draw() {
    if (!this.state || !this.frame.clientWidth) return;
    const { places, layers } = this.state;
    const most = Math.max(...layers.map((layer) => layer.place.length));
    const [width, height] = [this.frame.clientWidth - GUTTER, this.frame.clientHeight];
    const { side, columns } = layOut(layers.length, most, width, height);
    const rows = Math.ceil(most / columns);
    const band = rows * side + 2;
    this.grid = { side, columns, band };
    const ratio = devicePixelRatio || 1;
    const size = [GUTTER + columns * side, layers.length * band];
    const pixels = size.map((length) => Math.round(length * ratio));
    const { canvas } = this;
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
    [canvas.style.width, canvas.style.height] = size.map((length) => `${length}px`);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, ...size);
    this.drawCells(context, paletteOf(places), layers);
    this.drawNumbers(context, layers.length);
    if (this.selected) this.drawFrame(context, ...this.selected);
  }

  drawCells(context, palette, layers) {
    const { side, columns, band } = this.grid;
    const filled = side - (side >= 5 ? 1 : 0);
    layers.forEach(({ place, recent }, layer) => {
      for (let expert = 0; expert < place.length; expert++) {
        context.fillStyle = palette[place[expert]][(recent[expert] * LEVELS) >> 8];
        const row = Math.floor(expert / columns);
        context.fillRect(GUTTER + (expert - row * columns) * side, layer * band + row * side, filled, filled);
      }
    });
  }

  drawNumbers(context, numLayers) {
    const { band } = this.grid;
    const step = Math.ceil(12 / band);
    context.fillStyle = getComputedStyle(this.output).color;
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let layer = 0; layer < numLayers; layer += step) context.fillText(layer, GUTTER - 6, (layer + 0.5) * band - 1);
  }

  drawFrame(context, layer, expert) {
    const { side, columns, band } = this.grid;
    const row = Math.floor(expert / columns);
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2;
    context.strokeRect(GUTTER + (expert - row * columns) * side, layer * band + row * side, side - 1, side - 1);
  }

  cellAt(event) {
    if (!this.grid) return null;
    const box = this.canvas.getBoundingClientRect();
    const { side, columns, band } = this.grid;
    const [x, y] = [event.clientX - box.left - GUTTER, event.clientY - box.top];
    const layer = Math.floor(y / band), column = Math.floor(x / side);
    const expert = Math.floor((y - layer * band) / side) * columns + column;
    const isCell = x >= 0 && column < columns && expert < (this.state.layers[layer]?.place.length ?? 0);
    return isCell ? [layer, expert] : null;
  }

  onKey(event) {
    if (!this.state) return;
    const { layers } = this.state;
    const { columns } = this.grid;
    let [layer, expert] = this.selected ?? [0, 0];
    const count = layers[layer].place.length;
    switch (event.key) {
      case "ArrowRight": expert++; break;
      case "ArrowLeft": expert--; break;
      case "ArrowDown": expert + columns < count ? (expert += columns) : (layer++, expert %= columns); break;
      case "ArrowUp":
        if (expert >= columns) expert -= columns;
        else if (layer--) expert += Math.floor((count - 1 - expert) / columns) * columns;
        break;
      case "Home": expert = 0; break;
      case "End": expert = count - 1; break;
      case "PageDown": layer++; break;
      case "PageUp": layer--; break;
      default: return;
    }
    event.preventDefault();
    layer = Math.max(0, Math.min(layers.length - 1, layer));
    this.select([layer, Math.max(0, Math.min(layers[layer].place.length - 1, expert))]);
    const { band } = this.grid;
    const least = (layer + 1) * band - this.frame.clientHeight; // so that the layer is seen
    this.frame.scrollTop = Math.min(layer * band, Math.max(least, this.frame.scrollTop));
  }

  select(cell) {
    if (!cell || String(cell) === String(this.selected)) return;
    this.selected = cell;
    this.tell();
    this.draw();
  }

  tell() {
    const [layer, expert] = this.selected;
    const { places, layers } = this.state;
    const of = layers[layer];
    if (!of || expert >= of.place.length) return;
    const { tier, name, node } = places[of.place[expert]];
    const use = Math.round((100 * of.recent[expert]) / 255);
    const where = [tier, name, node && `on ${node}`].filter(Boolean).join(" ");
    this.output.textContent = `Layer ${layer}, expert ${expert}: ${where}; recent use ${use} of 100`;
  }
}
