"""A self-contained page in which any latent colours the tokens of spliced contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsae.runtime import files

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin-bottom: .2rem; color: #444; }
.controls { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ddd; }
input { font: inherit; width: 22rem; max-width: 60%; padding: .15rem .4rem; }
button { font: inherit; margin: .3rem .3rem 0 0; padding: 0 .5rem; border: 1px solid #bbb; background: #fafafa; cursor: pointer; }
button.on { border-color: #D55E00; background: #fbe3d3; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #bbb; padding-left: .7rem; margin-bottom: .8rem; }
.text span { border-radius: 2px; } .note { color: #555; }
</style>
<h1>TITLE</h1>
<p class="note">Passages follow each other in one context. A token is the darker the more the chosen latent is active on it;
point at one for the value. SUMMARY fire here.</p>
<div class="controls">
<label>Context <select id="context"></select></label>
<label>Latent <input id="latent" list="latents" placeholder="number or word of an explanation"></label><datalist id="latents"></datalist>
<div id="top"></div><div id="about" class="note" aria-live="polite"></div></div>
<div id="shown"></div>
<script type="application/json" id="data">DATA</script>
<script>
const contexts = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
let context, latent;
function values() {
  const found = new Map();
  for (const word of (context.activations[latent] || "").split(" ").filter(Boolean)) {
    const [at, value] = word.split(":");
    found.set(+at, +value);
  }
  return found;
}
function explained(name) { return context.explanations[name] ? name + ": " + context.explanations[name] : name; }
function paint() {
  const found = values(), peak = Math.max(0, ...found.values());
  byId("about").textContent = peak
    ? "Latent " + explained(latent) + " (active on " + found.size + " tokens, at most " + peak + ")"
    : "Latent " + explained(latent) + " is silent in this context.";
  const shown = byId("shown");
  shown.replaceChildren();
  context.passages.forEach((name, index) => {
    const heading = document.createElement("h2"), text = document.createElement("div");
    heading.textContent = name; text.className = "text";
    const end = index + 1 < context.starts.length ? context.starts[index + 1] : context.tokens.length;
    for (let at = index ? context.starts[index] : 0; at < end; at++) {
      const token = document.createElement("span"), value = found.get(at) || 0;
      token.textContent = context.tokens[at];
      if (value) { token.style.background = "rgba(213, 94, 0, " + (0.12 + 0.7 * value / peak) + ")"; token.title = value; }
      text.append(token);
    }
    shown.append(heading, text);
  });
  for (const button of byId("top").children) button.classList.toggle("on", button.dataset.latent === latent);
}
function choose(name) { latent = String(name); paint(); }
function show(index) {
  context = contexts[index];
  byId("latents").replaceChildren(...Object.keys(context.activations).map(name => {
    const option = document.createElement("option");
    option.value = name; option.label = explained(name);
    return option;
  }));
  byId("top").replaceChildren(...context.top.map(name => {
    const button = document.createElement("button");
    button.textContent = explained(String(name)).slice(0, 48); button.dataset.latent = String(name);
    button.onclick = () => { byId("latent").value = name; choose(name); };
    return button;
  }));
  byId("latent").value = "";
  choose(context.top[0]);
}
byId("latent").oninput = event => {
  const wanted = event.target.value.trim().toLowerCase();
  if (/^\\d+$/.test(wanted)) choose(wanted);
  else if (wanted) {
    const match = Object.keys(context.explanations).find(name => context.explanations[name].toLowerCase().includes(wanted));
    if (match) choose(match);
  }
};
contexts.forEach((each, index) => byId("context").add(new Option(index + 1 + ": " + each.passages.join(" · "), index)));
byId("context").onchange = event => show(+event.target.value);
show(0);
document.documentElement.dataset.ready = "yes";
</script>
</html>
"""


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page of `results` with the contexts and all latents that fire in them."""
    about = results["subject"]
    firing = len({latent for context in results["contexts"] for latent in context["activations"]})
    title = _escaped(f"{about['run']}: {results['split']} over spliced passages")
    # No "</" inside the data, where it could end the script element.
    data = json.dumps(results["contexts"]).replace("</", "<\\/")
    page = (
        PAGE.replace("TITLE", title)
        .replace("SUMMARY", f"{firing} latents ({results['split']})")
        .replace("DATA", data, 1)
    )
    files.write_text(path, page)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
