// strokes on paper; props.value is a PNG as a data URL, empty while nothing is drawn
const MODES = {
  lines: { paper: "#ffffff", inks: ["#000000"], pen: 1 },
  depth: { paper: "#000000", inks: ["#ffffff", "#c4c4c4", "#8c8c8c", "#585858", "#2c2c2c"], pen: 8 },
  colours: {
    paper: "#ffffff", pen: 8,
    inks: ["#d61a1a", "#fa800f", "#fadb1f", "#1f9e33", "#1a47db", "#8029b8", "#fa85b8", "#73421f", "#8fc3ea", "#171719"],
  },
  mask: { paper: "#000000", inks: ["#ffffff"], pen: 8 },
};
const canvas = element.querySelector("canvas");
const inkRow = element.querySelector(".sw-inks");
const context = canvas.getContext("2d");
const SIDE = 512;
let mode, ink, pen, erasing, strokes, cursor, down, picture;

function cut() {
  const scale = SIDE / Math.max(props.width, props.height);
  const [width, height] = [props.width, props.height].map((side) => Math.round(side * scale));
  if (canvas.width === width && canvas.height === height) return false;
  [canvas.width, canvas.height] = [width, height];
  return true;
}

function lay(target, paper, inkOf) {
  if (paper) {
    target.fillStyle = paper;
    target.fillRect(0, 0, canvas.width, canvas.height);
  }
  target.lineCap = target.lineJoin = "round";
  for (const { colour, size, points, erase } of strokes) {
    target.globalCompositeOperation = erase && !paper ? "destination-out" : "source-over";
    target.strokeStyle = target.fillStyle = erase ? paper || "#000" : inkOf(colour);
    target.lineWidth = size;
    target.beginPath();
    if (points.length === 1) {
      target.arc(...points[0], size / 2, 0, 7);
      target.fill();
    } else {
      target.moveTo(...points[0]);
      points.slice(1).forEach((point) => target.lineTo(...point));
      target.stroke();
    }
  }
  target.globalCompositeOperation = "source-over";
}

function sheet() {
  const made = document.createElement("canvas");
  made.width = canvas.width;
  made.height = canvas.height;
  return made;
}

function show() {
  if (mode === "mask") {
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const veil = sheet();
    lay(veil.getContext("2d"), null, () => "#14b8a6");
    context.globalAlpha = 0.6;
    context.drawImage(veil, 0, 0);
    context.globalAlpha = 1;
  } else lay(context, MODES[mode].paper, (colour) => colour);
  if (cursor && document.activeElement === canvas) {
    context.lineWidth = 2;
    context.strokeStyle = down ? "#14b8a6" : "#808080";
    context.strokeRect(cursor[0] - 7, cursor[1] - 7, 14, 14);
  }
}

function tell() {
  if (strokes.some((stroke) => !stroke.erase)) {
    const made = sheet();
    lay(made.getContext("2d"), MODES[mode].paper, (colour) => colour);
    props.value = made.toDataURL("image/png");
  } else props.value = "";
  trigger("input");
}

function mark() {
  inkRow.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", !erasing && button.dataset.ink === ink));
  element.querySelectorAll("[data-pen]").forEach((button) => button.setAttribute("aria-pressed", Number(button.dataset.pen) === pen));
  element.querySelector('[data-do="erase"]').setAttribute("aria-pressed", erasing);
}

function start(newMode) {
  mode = newMode in MODES ? newMode : "lines";
  ({ inks: [ink], pen } = MODES[mode]);
  [erasing, strokes, cursor, down] = [false, [], null, false];
  inkRow.replaceChildren(...(MODES[mode].inks.length > 1 ? MODES[mode].inks : []).map((colour) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.ink = colour;
    button.setAttribute("aria-label", `ink ${colour}`);
    button.style.setProperty("--ink", colour);
    return button;
  }));
  if (props.value) props.value = "";
  mark();
  show();
}

const begin = (point) => strokes.push({ colour: ink, size: (pen * canvas.width) / 128, points: [point], erase: erasing });
const extend = (point) => strokes.at(-1).points.push(point);
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

let drawing = false;
canvas.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  [drawing, cursor, down] = [true, null, false];
  begin(at(event));
  show();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  extend(at(event));
  show();
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => {
    if (drawing) tell();
    drawing = false;
  });
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (!(event.key in STEPS) && event.key !== " ") return;
  event.preventDefault();
  cursor ??= [canvas.width / 2, canvas.height / 2];
  if (event.key === " ") {
    down = !down;
    if (down) begin([...cursor]);
    else tell();
  } else {
    const far = canvas.width / (event.shiftKey ? 64 : 16);
    cursor = cursor.map((value, axis) => Math.min(Math.max(value + STEPS[event.key][axis] * far, 0), axis ? canvas.height : canvas.width));
    if (down) extend([...cursor]);
  }
  show();
});
canvas.addEventListener("blur", () => {
  if (down) tell();
  down = false;
  show();
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.ink) [ink, erasing] = [button.dataset.ink, false];
  if (button.dataset.pen) pen = Number(button.dataset.pen);
  if (button.dataset.do === "erase") erasing = !erasing;
  if (button.dataset.do === "undo" || button.dataset.do === "clear") {
    strokes = button.dataset.do === "undo" ? strokes.slice(0, -1) : [];
    tell();
  }
  mark();
  show();
});

function behind() {
  picture = null;
  if (!props.backdrop) return show();
  const loading = new Image();
  loading.onload = () => {
    picture = loading;
    show();
  };
  loading.src = props.backdrop;
}
watch("mode", () => start(props.mode));
// a sheet of another shape begins again
watch(["width", "height"], () => {
  if (cut()) start(props.mode);
});
watch("backdrop", behind);
watch("value", () => {
  if (!props.value) start(mode);
});
cut();
start(props.mode);
behind();
