// people of one picture, each 18 joints [x, y, confidence]; props.value is their OpenPose JSON
const SVG = "http://www.w3.org/2000/svg";
const board = element.querySelector(".sw-board");
const hint = element.querySelector(".sw-hint");
const select = element.querySelector("select");
const { joints, limbs, colours, poses } = props;
let { width, height } = props;
let unit = Math.min(width, height) / 64;
let people = [];
let history = [];

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
}

function read(text) {
  const record = JSON.parse(text);
  const across = width / (record.canvas_width || width), down = height / (record.canvas_height || height);
  return record.people.map(({ pose_keypoints_2d: flat }) =>
    joints.map((_, i) => [flat[3 * i] * across, flat[3 * i + 1] * down, flat[3 * i + 2]]));
}

function record() {
  const round = (number) => Math.round(number * 100) / 100;
  return JSON.stringify({
    people: people.map((person) => ({
      pose_keypoints_2d: person.flatMap(([x, y, seen]) => (seen > 0 ? [round(x), round(y), round(seen)] : [0, 0, 0])),
    })),
    canvas_height: height,
    canvas_width: width,
  });
}

// hidden joints keep their place in the page, but not in the record
function tell() {
  props.value = record();
  trigger("input");
}

function remember() {
  history.push(JSON.stringify(people));
  if (history.length > 100) history.shift();
}

function move(person, joint, x, y) {
  people[person][joint][0] = Math.min(width, Math.max(0, x));
  people[person][joint][1] = Math.min(height, Math.max(0, y));
  place();
}

function toggle(person, joint) {
  remember();
  people[person][joint][2] = people[person][joint][2] > 0 ? 0 : 1;
  place();
  tell();
}

function place() {
  board.querySelectorAll("line").forEach((line) => {
    const [first, second] = limbs[line.dataset.limb].map((joint) => people[line.dataset.person][joint]);
    const ends = { x1: first[0], y1: first[1], x2: second[0], y2: second[1] };
    for (const [key, value] of Object.entries(ends)) line.setAttribute(key, value);
    line.style.visibility = first[2] > 0 && second[2] > 0 ? "" : "hidden";
  });
  board.querySelectorAll("circle").forEach((dot) => {
    const [x, y, seen] = people[dot.dataset.person][dot.dataset.joint];
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
    dot.classList.toggle("sw-hidden", !(seen > 0));
    const where = `${joints[dot.dataset.joint]}, ${Math.round(x)} across, ${Math.round(y)} down`;
    dot.setAttribute("aria-label", seen > 0 ? where : `${joints[dot.dataset.joint]}, hidden`);
  });
}

function build() {
  board.replaceChildren();
  board.setAttribute("viewBox", `0 0 ${width} ${height}`);
  people.forEach((person, p) => {
    limbs.forEach((_, l) => make("line", { "data-person": p, "data-limb": l, stroke: colours[l], "stroke-width": 1.2 * unit }, board));
    person.forEach((_, j) => {
      const dot = make("circle", { "data-person": p, "data-joint": j, r: 1.4 * unit, fill: colours[j], tabindex: 0, role: "button" }, board);
      make("title", {}, dot).textContent = joints[j];
    });
  });
  place();
}

let held = null;
board.addEventListener("pointerdown", (event) => {
  const dot = event.target.closest("circle");
  if (!dot) return;
  event.preventDefault();
  dot.focus();
  remember();
  held = { dot, moved: false };
  board.setPointerCapture(event.pointerId);
});
board.addEventListener("pointermove", (event) => {
  if (!held) return;
  const box = board.getBoundingClientRect();
  held.moved = true;
  move(held.dot.dataset.person, held.dot.dataset.joint,
    ((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height);
});
for (const name of ["pointerup", "pointercancel"]) {
  board.addEventListener(name, () => {
    if (held?.moved) tell();
    else if (held) history.pop();
    held = null;
  });
}
board.addEventListener("dblclick", (event) => {
  const dot = event.target.closest("circle");
  if (dot) toggle(dot.dataset.person, dot.dataset.joint);
});

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
board.addEventListener("keydown", (event) => {
  const dot = event.target.closest("circle");
  if (!dot) return;
  const { person, joint } = dot.dataset;
  if (event.key in STEPS) {
    event.preventDefault();
    remember();
    const far = (event.shiftKey ? 6 : 1.5) * unit;
    const [x, y] = people[person][joint];
    move(person, joint, x + STEPS[event.key][0] * far, y + STEPS[event.key][1] * far);
    tell();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    event.preventDefault();
    toggle(person, joint);
  }
});
board.addEventListener("focusin", (event) => {
  const dot = event.target.closest("circle");
  if (dot) hint.textContent = dot.getAttribute("aria-label");
});

const ACTIONS = {
  mirror() {
    remember();
    const other = (name) => name.replace(/left|right/, (side) => (side === "left" ? "right" : "left"));
    people = people.map((person) => joints.map((name) => {
      const [x, y, seen] = person[joints.indexOf(other(name))];
      return [width - x, y, seen];
    }));
    place();
    tell();
  },
  undo() {
    if (!history.length) return;
    people = JSON.parse(history.pop());
    build();
    tell();
  },
  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([record()], { type: "application/json" }));
    link.download = "pose.json";
    link.click();
    URL.revokeObjectURL(link.href);
  },
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (button) ACTIONS[button.dataset.do]();
});

select.replaceChildren(...["", ...Object.keys(poses)].map((name) => new Option(name || "choose", name)));
select.addEventListener("change", () => {
  if (!select.value) return;
  remember();
  people = read(JSON.stringify(poses[select.value]));
  build();
  tell();
});

function show() {
  if (!props.value || props.value === record()) return;
  people = read(props.value);
  history = [];
  build();
}
// a picture of another size: all joints keep their part of the way across and down
function resize() {
  if (props.width === width && props.height === height) return;
  const across = props.width / width, down = props.height / height;
  people = people.map((person) => person.map(([x, y, seen]) => [x * across, y * down, seen]));
  ({ width, height } = props);
  unit = Math.min(width, height) / 64;
  history = [];
  build();
}
watch(["width", "height"], resize);
watch("value", show);
show();
