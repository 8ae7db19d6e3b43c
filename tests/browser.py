"""A page of adarank in headless Chromium, and what a probe in it sees: errors, sizes, contrasts, and what pressing buttons does."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
const seen = []; addEventListener("error", (event) => seen.push(event.message));
for (const kind of ["error", "warn"]) console[kind] = (...words) => seen.push(words.join(" "));
const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const paint = (colour) => { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); return [...brush.getImageData(0, 0, 1, 1).data]; };
const light = (rgb) => rgb.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + [0.2126, 0.7152, 0.0722][i] * v, 0);
function contrast(element) { // WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), of the words and what lies behind them
  const above = [];
  for (let part = element; part; part = part.parentElement) above.unshift(part);
  let ground = paint("#f0f");
  for (const part of above) {
    const style = getComputedStyle(part);
    ground = paint(style.backgroundColor);
    if (style.backgroundImage !== "none") ground = paint(style.getPropertyValue("--shade"));
  }
  const style = getComputedStyle(element);
  const ends = [light(ground), light(paint(element instanceof SVGElement ? style.fill : style.color))].sort((a, b) => b - a);
  return (ends[0] + 0.05) / (ends[1] + 0.05);
}
const written = () => [...document.querySelectorAll("body *")].filter((e) => !e.closest("script, style, select, svg[aria-hidden]")
  && [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && e.getClientRects().length);
function broken() { // words of names, up to a point or a line below, that are not on one line
  const words = [...document.querySelectorAll("tbody th")].flatMap((th) => [...th.childNodes].filter((node) => node.nodeType === 3)
    .flatMap((node) => [...node.data.matchAll(/\\S+/g)].map((word) => [node, word.index, word[0]])));
  return words.filter(([node, start, word]) => {
    const range = document.createRange();
    range.setStart(node, start);
    range.setEnd(node, start + word.length);
    return new Set([...range.getClientRects()].map((place) => Math.round(place.top))).size > 1;
  }).map(([, , word]) => word);
}
addEventListener("load", () => {
  const words = () => document.querySelector(".numbers tbody").textContent + document.querySelector(".maps canvas").ariaLabel;
  const picture = () => document.querySelector(".maps canvas").toDataURL();
  const first = [words(), picture()];
  document.querySelector(".next").click();
  const column = () => [...document.querySelectorAll("#scores tbody tr")].map((row) => row.cells[2].dataset.value).join();
  const button = document.querySelectorAll("#scores thead button")[2];
  button.click(); const up = column(); button.click(); const down = column();
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  const faint = written().filter((e) => contrast(e) < 4.5).map((e) => `${e.tagName} ${e.className} ${contrast(e)} ${e.textContent.slice(0, 40)}`);
  const result = { errors: seen, wide: document.documentElement.scrollWidth, window: innerWidth, faint, written: written().length,
                   dark: matchMedia("(prefers-color-scheme: dark)").matches, broken: broken(),
                   changed: words() !== first[0] && picture() !== first[1], up, down };
  parent.postMessage("RESULT" + JSON.stringify(result) + "END", "*");
});
</script>"""
LISTENER = """<script>addEventListener("message", (event) => { document.body.textContent = event.data; });</script>"""


def in_browser(page: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What the probe says of a page in a frame of this width: chromium's windows are 500 wide or more."""
    probed = page.replace("<style>", f"{PROBE}<style>", 1)
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(probed)}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body>{LISTENER}{frame}</body>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,900",
        f"--user-data-dir={folder}/user",
    ]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [str(CHROMIUM), *options, "--dump-dom", (folder / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"RESULT(\{.*?\})END", shown.stdout)
    assert match, shown.stderr
    result: dict[str, Any] = json.loads(html.unescape(match[1]))
    return result
