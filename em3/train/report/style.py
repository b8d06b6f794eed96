"""The style sheet of the report: system fonts, one accent, dark and light by the reader's setting."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #22262b; --muted: #666d76; --line: #e3e4e0; --soft: #f2f3ef;
  --accent: #0b7a75; --good: #1b7a3d; --bad: #b3382c; --warn: #fbf3dd;
  --s0: #7b8794; --s1: #d08a1d; --s2: #0b8a83; --s3: #8a5fb5; --s4: #c65146; --s5: #3f7fc4; --s6: #7f9131;
  --s7: #c4628f; --other: #b9bdc2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --card: #1c2024; --ink: #e4e6e8; --muted: #9aa2ab; --line: #30363c; --soft: #22272c;
    --accent: #4fc3ba; --good: #6cc98a; --bad: #f08a7e; --warn: #322b18;
    --s0: #98a4b1; --s1: #e5a948; --s2: #41bdb3; --s3: #b08fda; --s4: #e97b70; --s5: #6fa8e8; --s6: #a9bd57;
    --s7: #e38bb4; --other: #5d646b;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 56px 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
p { margin: 8px 0 16px; max-width: 76ch; }
.note { color: var(--muted); font-size: 14px; }
.over { color: var(--muted); font-size: 14px; margin: 0 0 6px; }
.result {
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--accent); border-radius: 8px;
  padding: 18px 22px; margin: 24px 0;
}
.result p { margin: 0; max-width: none; color: var(--muted); }
.result p:first-child { font-size: 19px; line-height: 1.4; color: var(--ink); }
.result p + p { margin-top: 8px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px 24px; margin: 0; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; font-size: 15px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scroll + .scroll, .scroll + .note { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; vertical-align: top; font-weight: 400; }
thead th { color: var(--muted); font-size: 13px; padding-bottom: 6px; }
thead tr:first-child th[colspan] { text-align: center; color: var(--ink); font-weight: 600; padding-bottom: 0; }
tbody tr { border-top: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); white-space: normal;
  min-width: 132px; max-width: 190px; }
.first { border-left: 1px solid var(--line); }
td small { display: block; color: var(--muted); font-size: 12px; line-height: 1.35; }
tr.ours th:first-child { font-weight: 650; }
tr.known { color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); }
.text th, .text td { text-align: left; white-space: normal; min-width: 140px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 12px 0; font-size: 14px; color: var(--muted); }
.legend span::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 7px; background: var(--swatch); }
.legend .ring::before, .legend .dot::before { border-radius: 50%; background: none; border: 1.5px solid var(--muted); }
.legend .dot::before { background: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 20px; }
figure { margin: 0; padding: 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  min-width: 0; }
svg { display: block; width: 100%; height: auto; max-height: 540px; }
svg text { font-family: inherit !important; fill: var(--muted); }
.bar { display: flex; height: 30px; border-radius: 6px; overflow: hidden; margin-top: 4px; background: var(--soft); }
.bar i { background: var(--swatch); min-width: 1px; border-right: 1px solid var(--card); }
.cards { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 16px; padding: 18px 0;
  border-top: 1px solid var(--line); }
.card { font-size: 13px; line-height: 1.35; min-width: 0; }
.card img, .card .none { display: block; width: 96px; max-width: 100%; border-radius: 6px; margin-bottom: 7px; }
.card .none { height: 110px; overflow: hidden; padding: 8px; border: 1px dashed var(--muted); background: var(--soft);
  color: var(--muted); font-size: 12px; }
.card .title { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.card small { color: var(--muted); display: block; }
.query { border-right: 1px solid var(--line); padding-right: 12px; font-weight: 600; }
.warnings { background: var(--warn); border-radius: 8px; padding: 12px 16px 12px 34px; margin: 8px 0; font-size: 15px; }
pre { margin: 0; padding: 14px 16px; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
footer { margin-top: 64px; color: var(--muted); font-size: 13px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 640px) {
  main { padding: 24px 16px 56px; }
  h1 { font-size: 25px; }
  h2 { margin-top: 44px; }
  .result { padding: 14px 16px; }
  .result p:first-child { font-size: 17px; }
  dl { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px 16px; }
  th, td { padding: 8px 10px; }
  .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px 12px; }
}
@media print {
  .scroll { overflow: visible; }
  h2 { break-after: avoid; }
  figure, .cards { break-inside: avoid; }
}
"""
