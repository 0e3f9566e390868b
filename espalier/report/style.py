"""The CSS of every report; that of a task's own elements comes with its sections (Section.style)."""

from espalier.report.figures import PALETTES

COLOURS = "{}@media(prefers-color-scheme:dark){{{}}}".format(
    *("".join(f".c{number}{{color:{colour}}}" for number, colour in enumerate(p["colours"])) for p in PALETTES)
)
STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2321;--soft:#5d6864;--line:#e2e5e1;--accent:#1b6e53;--fill:#dfece6;
--right:#d5eddf;--right-ink:#0f5c3d;--wrong:#fbe3d3;--wrong-ink:#8f3d0c;--bar:#b9c3be;--han:serif}
@media(prefers-color-scheme:dark){:root{--paper:#141816;--card:#1b201e;--ink:#e6ebe8;--soft:#9aa7a1;--line:#2d3532;
--accent:#6cc5a1;--fill:#22362e;--right:#1d4533;--right-ink:#9fe3c2;--wrong:#4a2c1b;--wrong-ink:#f3b893;--bar:#4d5954}}
:lang(zh){--han:"Songti SC","Noto Serif CJK SC","Noto Serif SC",SimSun}
:lang(ja){--han:"Hiragino Mincho ProN","Noto Serif CJK JP","Noto Serif JP","Yu Mincho"}
:lang(ko){--han:AppleMyungjo,"Noto Serif CJK KR","Noto Serif KR",Batang}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:50rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.mark{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.09em;text-transform:uppercase}
h1{margin:.15rem 0 .2rem;font-size:clamp(1.6rem,5vw,2.2rem);line-height:1.15;letter-spacing:-.02em}
.sub{margin:0;color:var(--soft);max-width:42rem}
h2{margin:3rem 0 .3rem;font-size:1.2rem;letter-spacing:-.01em}
.note{margin:0 0 1rem;color:var(--soft);font-size:.9rem;max-width:42rem}
dl,dd,ul,ol{margin:0;padding:0;list-style:none}
.tiles{display:flex;flex-wrap:wrap;margin:1.75rem 0 0;gap:1px;
background:var(--line);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.tiles div{flex:1 1 8.5rem;background:var(--card);padding:.75rem .9rem}
.tiles dt{color:var(--soft);font-size:.78rem}
.tiles dd{font-size:1.3rem;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
picture,img{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend i{flex:none;width:1.3rem;border-top:3px solid}.legend .bar{border-top:2px dashed var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:1rem 1.5rem;align-items:start}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top}
.entries{display:grid;gap:.8rem}.entries small{color:var(--soft)}
.entries p{margin:.1rem 0 0;font-family:ui-serif,Georgia,"Times New Roman",var(--han),serif}
.bars li{display:grid;grid-template-columns:minmax(8rem,15rem) minmax(0,1fr) 4.2rem;gap:.75rem;align-items:center;
padding:.45rem 0}
.bars small{display:block;color:var(--soft);font-size:.78rem;line-height:1.3}
.bars i{background:var(--line);border-radius:4px;height:.85rem;overflow:hidden}
.bars b{display:block;height:100%;background:var(--bar);border-radius:4px}
.bars em{font-style:normal;text-align:right;font-variant-numeric:tabular-nums}
.bars .own b{background:var(--accent)}.bars .own em,.bars .own span{font-weight:600}.bars .own small{font-weight:400}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));column-gap:2rem;font-size:.86rem}
.settings div{display:flex;justify-content:space-between;gap:1rem;padding:.25rem 0;border-bottom:1px solid var(--line)}
.settings dt{color:var(--soft);min-width:5rem}
.settings dd{text-align:right;font-variant-numeric:tabular-nums}
details{border-bottom:1px solid var(--line);padding:.15rem 0}
details[open]{padding-bottom:1rem}
.settings details{border:0;padding:0}
.settings details summary{padding:.1rem 0;color:var(--accent)}
summary{cursor:pointer;padding:.4rem 0;font-weight:500;font-size:.92rem}
@media(max-width:34rem){main{padding-left:1rem;padding-right:1rem;padding-top:1.5rem}
.bars li{grid-template-columns:minmax(0,1fr) 4.2rem}.bars li span{grid-column:1/-1}
.settings{grid-template-columns:1fr}}
@media print{details::details-content{content-visibility:visible;height:auto}section{break-inside:avoid}}
"""
