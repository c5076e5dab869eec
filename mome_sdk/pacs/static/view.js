// Shows a scan with its mask; the page says where they are.
import { Niivue } from "/static/niivue.js";

const canvas = document.getElementById("view");
const state = document.getElementById("state");
try {
  const viewer = new Niivue({ isResizeCanvas: true, backColor: [0, 0, 0, 1], crosshairColor: [0.5, 0.5, 0.5, 1] });
  await viewer.attachToCanvas(canvas);
  await viewer.loadVolumes([
    { url: canvas.dataset.scan, name: "scan.nii.gz" },
    { url: canvas.dataset.mask, name: "mask.nii.gz", colormap: "red", opacity: 0.6, cal_min: 0.5, cal_max: 1 },
  ]);
  state.textContent = "shown";
} catch (error) {
  state.textContent = `cannot be shown: ${error.name}`;
}
