"""A self-contained page of the map: pointing at a token shows it in its text, a label's name brings its tokens out."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from tsae.runtime import files

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 1.2rem auto; max-width: 92rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; margin: 0; } h2 { font-size: 1rem; margin: .6rem 0 0; }
.note { color: #555; font-size: .85rem; margin: .2rem 0; } section .note { min-height: 2.9em; }
#panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
canvas { width: 100%; aspect-ratio: 1; border: 1px solid #ddd; display: block; cursor: crosshair; }
.keys { line-height: 1.3; min-height: 3rem; }
.keys button { font: inherit; font-size: .8rem; border: 1px solid transparent; background: none; padding: 0 .3rem; cursor: pointer; }
.keys button.on { border-color: #333; } .keys i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .25em; }
#about { position: sticky; bottom: 0; background: #fff; border-top: 1px solid #ddd; min-height: 6rem; padding: .4rem 0; }
#words { white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: #F2C230; padding: 0 1px; }
</style>
<h1>TITLE</h1>
<p class="note">ABOUT</p>
<div id="panels"></div>
<div id="about" aria-live="polite"><p class="note" id="labels">Point at a token to see it in its text.</p><div id="words"></div></div>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent), map = data.map, count = map.x.length;
const colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C564B", "#117733", "#AA4499",
  "#999933", "#6A3D9A", "#B15928", "#1B9E77", "#E7298A", "#66A61E", "#7570B3", "#A6761D", "#666666", "#E41A1C"];
const low = [Math.min(...map.x), Math.min(...map.y)], high = [Math.max(...map.x), Math.max(...map.y)];
const width = Math.max(high[0] - low[0], high[1] - low[1]) || 1, middle = low.map((value, axis) => (value + high[axis]) / 2);
const side = 640, at = Array.from({length: count}, (_, i) => [
  side * (0.5 + 0.94 * (map.x[i] - middle[0]) / width), side * (0.5 - 0.94 * (map.y[i] - middle[1]) / width)]);
const panels = [["semantics", map.semantics, map.semantics_names], ["context", map.text, null], ["syntax", map.syntax, map.syntax_names]];
let pointed = -1;
function colour(panel, label) {
  if (label < 0) return "#cccccc";
  return panel[2] ? colours[label % colours.length] : "hsl(" + (label * 222.49) % 360 + " 70% 45%)";
}
function paint(panel) {
  const pen = panel.canvas.getContext("2d"), chosen = panel.chosen;
  pen.clearRect(0, 0, side, side);
  for (const front of chosen < 0 ? [true] : [false, true]) for (let i = 0; i < count; i++) {
    if (chosen >= 0 && (panel[1][i] === chosen) !== front) continue;
    pen.fillStyle = front ? colour(panel, panel[1][i]) : "#dddddd";
    pen.beginPath(); pen.arc(at[i][0], at[i][1], front ? 2.6 : 1.8, 0, 7); pen.fill();
  }
  if (pointed < 0) return;
  pen.strokeStyle = "#000"; pen.lineWidth = 2;
  pen.beginPath(); pen.arc(at[pointed][0], at[pointed][1], 6, 0, 7); pen.stroke();
}
function nearest(x, y) {
  let best = -1, distance = 14 * 14;
  for (let i = 0; i < count; i++) {
    const found = (at[i][0] - x) ** 2 + (at[i][1] - y) ** 2;
    if (found < distance) { distance = found; best = i; }
  }
  return best;
}
function point(event) {
  const box = event.target.getBoundingClientRect();
  const found = nearest((event.clientX - box.left) / box.width * side, (event.clientY - box.top) / box.height * side);
  if (found === pointed) return;
  pointed = found;
  panels.forEach(paint);
  if (found < 0) return;
  const pieces = map.tokens[map.text[found]], place = map.token[found], token = document.createElement("mark");
  token.textContent = pieces[place];
  document.getElementById("words").replaceChildren(
    "… " + pieces.slice(Math.max(0, place - 40), place).join(""), token, pieces.slice(place + 1, place + 41).join(""));
  document.getElementById("labels").textContent = map.semantics_names[map.semantics[found]] + " · text " + map.text[found]
    + " · " + (map.syntax[found] < 0 ? "no class" : map.syntax_names[map.syntax[found]]);
}
for (const panel of panels) {
  const box = document.createElement("section"), title = document.createElement("h2"), about = document.createElement("p");
  const keys = document.createElement("div"), entry = data.colourings[panel[0]];
  panel.canvas = document.createElement("canvas"); panel.canvas.width = panel.canvas.height = side; panel.chosen = -1;
  panel.canvas.id = panel[0]; title.textContent = panel[0]; about.className = "note"; keys.className = "keys";
  about.textContent = entry.labels + ". Purity " + entry.purity.toFixed(2) + " (chance " + entry.chance.toFixed(2)
    + "), silhouette " + entry.silhouette.toFixed(2);
  (panel[2] || []).forEach((name, label) => {
    if (!panel[1].includes(label)) return;
    const key = document.createElement("button"), dot = document.createElement("i");
    dot.style.background = colour(panel, label); key.append(dot, name);
    key.onclick = () => {
      panel.chosen = panel.chosen === label ? -1 : label;
      keys.querySelectorAll("button").forEach(other => other.classList.toggle("on", other === key && panel.chosen >= 0));
      paint(panel);
    };
    keys.append(key);
  });
  if (!panel[2]) keys.textContent = "A colour for each text.";
  panel.canvas.onmousemove = point;
  box.append(title, about, panel.canvas, keys);
  document.getElementById("panels").append(box);
  paint(panel);
}
document.documentElement.dataset.ready = "1";
</script>
</html>
"""


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page of a map's results, with all it needs inside."""
    subject = results["subject"]
    title = f"{subject['run']}, {results['split']}: {len(results['map']['x'])} tokens"
    about = (
        f"{subject['model']} layer {subject['layer']}, {results['texts']['dataset']}. {results['reduction']}. Purity and "
        f"silhouette are measured by cosine in the original space. Press the name of a class to bring its tokens out."
    )
    shown = {"map": results["map"], "colourings": results["colourings"]}
    data = json.dumps(shown, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    page = PAGE.replace("TITLE", html.escape(title)).replace("ABOUT", html.escape(about)).replace("DATA", data)
    files.write_text(path, page)
