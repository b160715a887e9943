"""How the report looks: by the reader's choice light or dark, from a telephone to a wide screen,
and on paper. Text has a contrast of 4.5 to 1 and more with what it stands on, lines and bars of 3
to 1 (WCAG 2.2, 1.4.3 and 1.4.11); a test computes them."""

from __future__ import annotations

LIGHT = {
    "page": "#ffffff", "panel": "#f6f8fa", "text": "#1f2328", "dim": "#59636e", "rule": "#d1d9e0",
    "good": "#1a7f37", "bad": "#cf222e", "link": "#0969da",
    "c0": "#0969da", "c1": "#bc4c00", "c2": "#1a7f37", "c3": "#8250df", "c4": "#bf3989",
    "c5": "#7d4e00", "c6": "#1b7c83", "c7": "#57606a", "c8": "#cf222e", "c9": "#4d2d00",
    "c10": "#2f6f44",
}  # fmt: skip

DARK = {
    "page": "#0d1117", "panel": "#161b22", "text": "#e6edf3", "dim": "#9198a1", "rule": "#3d444d",
    "good": "#3fb950", "bad": "#ff7b72", "link": "#58a6ff",
    "c0": "#58a6ff", "c1": "#f0883e", "c2": "#3fb950", "c3": "#bc8cff", "c4": "#f778ba",
    "c5": "#d29922", "c6": "#39c5cf", "c7": "#8b949e", "c8": "#ff7b72", "c9": "#e3b341",
    "c10": "#7ee787",
}  # fmt: skip

NUM_COLOURS = 11

# Over every second and third colour, so that neighbours differ without colours too.
_PATTERNS = (
    "none",
    "repeating-linear-gradient(45deg,var(--page) 0 1px,transparent 1px 5px)",
    "repeating-linear-gradient(90deg,var(--page) 0 1px,transparent 1px 4px)",
    "repeating-linear-gradient(-45deg,var(--page) 0 1px,transparent 1px 5px)",
)

_PLAIN = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:1.5rem clamp(.9rem,3vw,2.5rem) 3rem;
 background:var(--page);color:var(--text);line-height:1.5;
 font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .4rem}
p{margin:.5rem 0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:.8rem;
 overflow-x:auto}
.outcome{color:var(--dim);overflow-wrap:anywhere}
.badge{display:inline-block;border:1.5px solid currentColor;border-radius:99px;
 padding:0 .7em;margin-right:.4em;white-space:nowrap}
.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}.badge.open{color:var(--text)}
.warning{border-left:4px solid var(--bad);background:var(--panel);padding:.6rem .9rem;
 overflow-wrap:anywhere;white-space:pre-wrap}
.note{color:var(--dim);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem;
 margin:1.1rem 0 0}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:.7rem .9rem;
 display:flex;flex-direction:column}
.card .label,.card .beside{color:var(--dim);font-size:.85rem}
.card .figure{font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
figure{margin:0 0 1.4rem}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;margin-bottom:.5rem;font-size:.92rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;color:var(--dim)}
.legend span{display:inline-flex;align-items:center;gap:.35rem}
td:last-child:not(.number){min-width:9rem}
.row figure{margin-bottom:.6rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));
 gap:.2rem 1.6rem;margin-top:1.4rem}
.frame{display:grid;grid-template-columns:auto 1fr;padding:.5rem .6rem 0 0;font-size:.78rem;
 color:var(--dim);font-variant-numeric:tabular-nums}
.plot{height:clamp(170px,34vw,300px);border-left:1px solid var(--dim);
 border-bottom:1px solid var(--dim)}
.small .plot{height:120px}
.plot svg{display:block;width:100%;height:100%;overflow:visible}
.ys{position:relative;width:3.6rem}
.ys span{position:absolute;right:.4rem;transform:translateY(50%);line-height:1;white-space:nowrap}
.xs{position:relative;grid-column:2;height:1.2rem;margin-top:.2rem}
.xs span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.xlabel{grid-column:2;text-align:center}
svg line,svg polyline,svg path{vector-effect:non-scaling-stroke;fill:none;stroke:currentColor}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{stroke-width:2.2}
svg .faint{stroke-width:1;opacity:.65}
svg .dashed{stroke-width:2;stroke-dasharray:7 5}
svg .dots{stroke-width:9;stroke-linecap:round}
svg.key{width:16px;height:16px}
.bar{display:grid;grid-template-columns:9.5rem 1fr 6rem;align-items:center;gap:0 .7rem;
 font-size:.88rem}
.bar .name{text-align:right}
.bar .value{font-variant-numeric:tabular-nums;white-space:nowrap}
.bar.told{margin-bottom:.55rem}
.bar.told .name,.bar.told .value{color:var(--dim)}
.track{display:flex;height:1.15rem;margin:1px 0}
.told .track{height:.7rem}
.part{display:block;background-color:currentColor;border-right:1px solid var(--page)}
i.measured{display:block;border:1.5px solid var(--text);
 background:repeating-linear-gradient(-45deg,var(--text) 0 1.5px,transparent 1.5px 6px)}
i.key{display:inline-block;width:14px;height:14px;border-radius:2px}
.part,i.measured,.badge,.card{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.scroll{overflow-x:auto;margin:0 0 1.2rem}
table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,30rem)}
caption{text-align:left;font-weight:600;padding:.2rem 0 .4rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;font-weight:400;
 border-bottom:1px solid var(--rule)}
thead th{color:var(--dim);font-size:.85rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.settings th{white-space:nowrap}
.settings td:nth-child(2){font-weight:600}
small{display:block;color:var(--dim)}
details{margin:0 0 1.2rem}
summary{cursor:pointer;color:var(--link);padding:.3rem 0}
dl{margin:0}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
dt{color:var(--dim);font-size:.88rem}
.facts{margin-bottom:1.2rem}
.facts>div,.commands>div{display:grid;grid-template-columns:14rem 1fr;gap:0 1rem;padding:.15rem 0}
.sample{background:var(--panel);border:1px solid var(--rule);border-radius:8px;
 padding:.9rem 1rem;margin-bottom:.9rem}
.sample dl{display:grid;grid-template-columns:1fr 1fr;gap:.6rem 1.4rem}
.sample dl>div:first-child,.sample dl>div:last-child{grid-column:1/-1}
dl+h3{margin-top:1.2rem}
footer{margin-top:2.5rem;color:var(--dim);font-size:.85rem}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
@media (max-width:600px){
 .sample dl{grid-template-columns:1fr}
 .bar{grid-template-columns:1fr auto;gap:0 .7rem}
 .bar .name{text-align:left}
 .bar .track{grid-column:1/-1;grid-row:2}
 .facts>div,.commands>div{grid-template-columns:1fr;padding:.3rem 0}
 .ys{width:2.9rem}
 .settings thead{display:none}
 .settings tr{display:block;padding:.45rem 0;border-bottom:1px solid var(--rule)}
 .settings th,.settings td{display:inline;border:0;padding:0 .6rem 0 0}
 .settings td:nth-child(3){color:var(--dim)}
 .settings td:last-child{display:block;color:var(--dim)}
}
@media print{
 body{max-width:none;padding:0;font-size:10pt}
 .bar,.chart,.sample,tr,.card{break-inside:avoid}
 h2{break-after:avoid}
 .scroll{overflow:visible}
 table{min-width:0}
}
"""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _palette() -> str:
    rules = []
    for at in range(NUM_COLOURS):
        pattern = _PATTERNS[at % len(_PATTERNS)]
        rules.append(f".c{at}{{color:var(--c{at})}}.part.c{at}{{background-image:{pattern}}}")
    return "".join(rules)


CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    f"{_palette()}{_PLAIN}"
)
