"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const symbols = ["circle", "diamond", "square", "triangle-up", "cross", "star"];
  const classSymbols = ["circle", "x", "triangle-up", "square", "diamond", "cross", "star", "triangle-down",
                        "pentagon", "hexagram"];
  const grey = "#7a828b";
  const config = {responsive: true, displaylogo: false, displayModeBar: false};
  const drawn = new Set();
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The library is run after the page has been painted, since that takes longer than all else.
  let library;
  const paint = () => new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
  function loaded() {
    library ??= paint().then(() => {
      const script = document.createElement("script");
      script.textContent = document.getElementById("plotly").textContent;
      document.head.append(script);
    });
    return library;
  }

  function layout(xTitle, yaxis, legend) {
    const text = colour("--text"), grid = colour("--grid");
    const axis = {automargin: true, zeroline: false, gridcolor: grid, linecolor: grid};
    return {
      font: {size: 13, family: "system-ui, sans-serif", color: text},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: {l: 10, r: 16, t: 12, b: 48},
      showlegend: legend,
      legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left", itemsizing: "constant"},
      xaxis: {...axis, title: {text: xTitle}},
      yaxis: {...axis, ...yaxis},
      hoverlabel: {align: "left", bgcolor: colour("--band"), bordercolor: colour("--line"), font: {color: text}},
    };
  }

  // Points with intervals: rows from the top, the sets of features below each other within a row.
  function rowFigure({rows, series, axis, reference}) {
    const count = series.length, last = rows.length - 1;
    const data = series.map(({set, value, low, high, text}, index) => {
      const shift = count > 1 ? 0.36 * (count - 1) / count * (1 - 2 * index / (count - 1)) : 0;
      const color = figures.colours[set % figures.colours.length];
      const distance = limits => value.map((v, row) => limits[row] === null ? 0 : Math.abs(limits[row] - v));
      return {
        type: "scatter", mode: "markers", x: value, y: value.map((_, row) => last - row + shift),
        marker: {color, symbol: symbols[set % symbols.length], size: 11},
        error_x: {type: "data", symmetric: false, array: distance(high), arrayminus: distance(low), color,
                  thickness: 1.5, width: 4},
        text, hovertemplate: "%{text}<extra></extra>",
      };
    });
    const figure = layout(axis, {tickvals: rows.map((_, row) => last - row), ticktext: rows,
                                 range: [-0.6, rows.length - 0.4], fixedrange: true}, false);
    if (reference !== null) {
      figure.shapes = [{type: "line", x0: reference, x1: reference, y0: 0, y1: 1, yref: "paper", layer: "below",
                        line: {color: grey, width: 1.5, dash: "dash"}}];
    }
    return [data, figure];
  }

  // Two principal components, coloured by a column; the classes of the label by symbol.
  function pointFigure({treatment, column}) {
    const {x, y, axes, ranges} = figures.treatments[treatment], values = figures.columns[column];
    const label = figures.label, hovertemplate = "%{text}<extra></extra>";
    const at = (numbers, rows) => rows.map(row => numbers[row]);
    const all = x.map((_, row) => row);
    const data = [];
    if (values.numbers) {
      const rows = all.filter(row => values.numbers[row] !== null);
      const said = row => `${values.name} ${values.texts ? values.texts[row] : values.numbers[row]}`
        + (label ? `<br>${label.name} ${label.names[label.codes[row]]}` : "");
      const colorbar = {title: {text: values.name, side: "right"}, thickness: 12};
      if (values.ticks) [colorbar.tickvals, colorbar.ticktext] = values.ticks;
      const bySymbol = label && label.names.length <= classSymbols.length;
      data.push({
        type: "scatter", mode: "markers", x: at(x, rows), y: at(y, rows), text: rows.map(said), hovertemplate,
        marker: {color: at(values.numbers, rows), colorscale: "Viridis", size: 6, opacity: 0.85, colorbar,
                 symbol: bySymbol ? rows.map(row => classSymbols[label.codes[row]]) : "circle",
                 line: {width: 0.5, color: "rgba(128,128,128,0.6)"}},
      });
    } else {
      values.names.forEach((name, code) => {
        const rows = all.filter(row => values.codes[row] === code);
        const color = figures.class_colours[code] ?? grey, symbol = classSymbols[code % classSymbols.length];
        const legendgroup = String(code);
        data.push({type: "scatter", mode: "markers", name, legendgroup, x: at(x, rows), y: at(y, rows),
                   text: `${values.name} ${name}`, hovertemplate,
                   marker: {color, symbol, size: 6, opacity: 0.6}});
        const outline = values.outlines[treatment][code];
        if (!outline) return;
        const [[meanX, ...lineX], [meanY, ...lineY]] = outline;
        const quiet = {type: "scatter", legendgroup, showlegend: false, hoverinfo: "skip"};
        data.push({...quiet, mode: "lines", x: lineX, y: lineY, line: {color, width: 2}});
        data.push({...quiet, mode: "markers", x: [meanX], y: [meanY],
                   marker: {color, symbol, size: 13, line: {width: 2, color: "#ffffff"}}});
      });
    }
    const figure = layout(axes[0], {title: {text: axes[1]}}, !values.numbers);
    if (ranges) [figure.xaxis.range, figure.yaxis.range] = ranges;
    return [data, figure];
  }

  const figureOf = values => values.rows ? rowFigure(values) : pointFigure(values);

  // One figure at a time, so that the page answers in between.
  async function draw(panel) {
    const elements = panel.querySelectorAll(".plot");
    if (elements.length) await loaded();
    for (const element of elements) {
      if (panel.hidden) return;
      if (drawn.has(element.id)) { Plotly.Plots.resize(element); continue; }
      drawn.add(element.id);
      const values = figures.plots[element.id];
      // Room for the lines of the legend, of about three names in 400 pixels.
      const names = values.rows ? [] : figures.columns[values.column].names ?? [];
      element.style.height = `${parseInt(element.style.height) + 20 * Math.ceil(130 * names.length / element.clientWidth)}px`;
      Plotly.newPlot(element, ...figureOf(values), config);
      await paint();
    }
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const id of drawn) Plotly.react(id, ...figureOf(figures.plots[id]), config);
  });

  const tabs = [...document.querySelectorAll("[role=tab]")];
  const panelOf = tab => document.getElementById(tab.getAttribute("aria-controls"));
  function select(tab, focus) {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      other.tabIndex = chosen ? 0 : -1;
      panelOf(other).hidden = !chosen;
    }
    if (focus) tab.focus();
    tab.scrollIntoView({block: "nearest", inline: "nearest"});
    draw(panelOf(tab));
  }
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => select(tab, false));
    tab.addEventListener("keydown", event => {
      const to = {ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1}[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(tabs[(to + tabs.length) % tabs.length], true);
    });
  });
  for (const link of document.querySelectorAll("a[data-tab]")) {
    link.addEventListener("click", event => {
      event.preventDefault();
      select(document.getElementById(link.dataset.tab), true);
    });
  }
  select(tabs.find(tab => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0], false);
})();
