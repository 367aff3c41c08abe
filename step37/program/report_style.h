// How report.html looks, in light and dark.
#pragma once

namespace step37 {

inline constexpr char kReportStyle[] = R"css(
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --muted: #5a6370; --line: #dfe3e8;
  --training: #1f5fbf; --validation: #b84a00; --held-out: #7a3fa0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121519; --card: #1b2026; --text: #e7eaee; --muted: #9aa5b1; --line: #323a43;
    --training: #7fb0ff; --validation: #ffa45c; --held-out: #cf9df0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 16px; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 8px; font-size: 1.1rem; }
h3 { margin: 20px 0 8px; font-size: 1rem; }
small, .note, .legend, caption, dt { color: var(--muted); font-weight: normal; }
small { font-size: .85rem; }
section, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; }
section { margin: 16px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(210px, 45%), 1fr)); gap: 12px; margin: 0; }
.tiles > div { padding: 12px 16px; }
.tiles dt { font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles small { display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
.pair section { margin: 0; min-width: 0; }
.legend { margin: 0 0 12px; font-size: .85rem; }
.legend span { margin-right: 20px; white-space: nowrap; }
.legend span::before { content: ""; display: inline-block; width: 20px; margin-right: 6px; vertical-align: middle;
  border-top: 1px solid var(--training); }
.legend .raw::before { opacity: .6; }
.legend .mean::before { border-top-width: 3px; }
.legend .validation::before { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--validation); }
.chart { padding: 8px 14px 0 50px; }
.chart > svg { display: block; width: 100%; overflow: visible; }
.chart text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .y { text-anchor: end; }
.chart .x { text-anchor: middle; }
.chart .grid { stroke: var(--line); }
.chart .axis, .chart .tick { stroke: var(--muted); }
.chart polyline { fill: none; stroke: var(--training); stroke-linejoin: round; }
.chart .raw { stroke-width: 1px; opacity: .4; }
.chart .mean { stroke-width: 2.5px; }
.chart .single { stroke-width: 1.5px; }
.chart circle { fill: var(--validation); stroke: var(--card); stroke-width: 1.5px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); gap: 12px; }
article { border: 1px solid var(--line); border-top: 3px solid var(--training); border-radius: 8px; padding: 12px; }
article.held-out { border-top-color: var(--held-out); }
.frame { display: flex; align-items: center; justify-content: center; height: 160px; padding: 8px; border-radius: 4px;
  background: #fff; color: #5a6370; }
.frame .note { color: inherit; text-align: center; overflow-wrap: anywhere; }
.frame img { max-width: 100%; max-height: 100%; }
.badge { margin: 8px 0 4px; font-size: .8rem; font-weight: 600; color: var(--training); }
.held-out .badge { color: var(--held-out); }
article dl { margin: 0; font-size: .95rem; line-height: 1.4; }
article dt { font-size: .8rem; }
article dd { margin: 0 0 6px; overflow-wrap: anywhere; }
.settings { columns: 2 320px; column-gap: 32px; }
table { width: 100%; margin: 0 0 16px; border-collapse: collapse; break-inside: avoid; font-size: .9rem; }
caption { text-align: left; font-weight: 600; }
th, td { padding: 3px 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
th { text-align: left; font-weight: normal; padding-right: 16px; }
td { text-align: right; font-variant-numeric: tabular-nums; }
)css";

}  // namespace step37
