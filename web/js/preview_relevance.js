/* Preview Relevance: a click on the node's preview sets x, y and frame to the clicked pixel of the clip.
 *
 * The preview is the frontend's own, so it is read where the frontend keeps it: on the classic canvas from the node
 * (imgs, imageIndex, imageRects) and its preview widget, with Nodes 2.0 from the <img> elements inside the node.
 */
import { app } from "../../../scripts/app.js";

const NODE = "STE_PreviewRelevance";
const CANVAS_PREVIEW = "$$canvas-image-preview";
const BUTTON = { side: 30, inset: 40, top: 10 }; // the canvas preview's own buttons: 1/8 and x, in its pixels
const DRAG = 6; // pixels
const CAPTION = 15; // height of the size written under a picture

/** Where a picture lies that is shown whole and centred in a box: [x, y, width, height]. */
function fitted(image, [x, y, width, height], largest = Infinity) {
  const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight, largest);
  const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
  return [x + (width - w) / 2, y + (height - h) / 2, w, h];
}

const inside = ([px, py], [x, y, width, height]) => px >= x && px < x + width && py >= y && py < y + height;

/** Sets the widgets to the pixel of `image`, which is drawn at `rect`, under `point`; nothing outside it. */
function pick(node, frame, image, rect, point) {
  if (frame < 0 || !image?.naturalWidth || !inside(point, rect)) return;
  const pixel = (axis, size) => Math.min(Math.floor(((point[axis] - rect[axis]) / rect[axis + 2]) * size), size - 1);
  const values = { x: pixel(0, image.naturalWidth), y: pixel(1, image.naturalHeight), frame };
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((w) => w.name === name);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  node.setDirtyCanvas(true, true);
}

/** A click at `point`, in the node's coordinates, on its preview on the canvas. */
function onCanvasClick(node, widget, index, rects, point) {
  if (index == null) {
    const frame = rects?.findIndex((rect) => inside(point, rect)) ?? -1;
    if (frame >= 0) pick(node, frame, node.imgs[frame], fitted(node.imgs[frame], rects[frame]), point);
    return;
  }
  const width = widget.width ?? node.size[0];
  const caption = app.ui.settings.getSettingValue("Comfy.Node.AllowImageSizeDraw") ? CAPTION : 0;
  const box = [0, widget.y, width, widget.computedHeight - caption];
  const buttons = [box[3] - BUTTON.inset, BUTTON.top].map((top) => [
    width - BUTTON.inset, widget.y + top, BUTTON.side, BUTTON.side,
  ]);
  if (node.imgs.length > 1 && buttons.some((button) => inside(point, button))) return;
  pick(node, index, node.imgs[index], fitted(node.imgs[index], box, 1), point);
}

/** Lets a preview widget of the canvas tell its clicks, in addition to what it does with them. */
function listen(node, widget) {
  const original = widget.onPointerDown;
  widget.onPointerDown = function (pointer, ...rest) {
    const handled = original?.call(this, pointer, ...rest);
    const { imageIndex, imageRects } = node; // before the click enlarges a picture
    const { canvasX, canvasY } = pointer.eDown;
    const point = [canvasX - node.pos[0], canvasY - node.pos[1]];
    const click = pointer.onClick;
    pointer.onClick = (event) => {
      click?.(event);
      onCanvasClick(node, widget, imageIndex, imageRects, point);
    };
    return handled;
  };
}

/** Index of a shown picture among the pictures of its run, -1 for others. */
function frameOf(image) {
  const name = new URL(image.src, location.href).searchParams.get("filename");
  const found = Object.values(app.nodeOutputs).map(({ images }) => images?.findIndex((i) => i.filename === name) ?? -1);
  return Math.max(-1, ...found);
}

let pressed = [0, 0]; // where the pointer went down, to tell a click from the end of a drag

/** A click on a preview that is a part of the page (Nodes 2.0). */
function onPageClick(event) {
  if (Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > DRAG) return;
  const element = event.target.closest?.("[data-node-id]");
  const node = element && app.canvas.graph?.getNodeById(element.dataset.nodeId);
  if (node?.comfyClass !== NODE) return;
  const point = [event.clientX, event.clientY];
  const box = ({ left, top, width, height }) => [left, top, width, height];
  for (const image of element.querySelectorAll(".image-preview img")) {
    const bounds = box(image.getBoundingClientRect());
    const button = event.target.closest("button");
    if (!inside(point, bounds) || (button && !button.contains(image))) continue;
    pick(node, frameOf(image), image, fitted(image, bounds), point);
  }
}

app.registerExtension({
  name: "spacetime_edit.preview_relevance",
  setup() {
    document.addEventListener("pointerdown", (event) => (pressed = [event.clientX, event.clientY]), { capture: true });
    document.addEventListener("click", onPageClick, { capture: true });
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const add = node.addCustomWidget;
    node.addCustomWidget = function (widget) {
      const added = add.call(this, widget);
      if (widget.name === CANVAS_PREVIEW) listen(node, added);
      return added;
    };
  },
});
