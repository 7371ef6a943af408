//! A roofline plot (Williams, Waterman & Patterson 2009) of reports: how near each test comes to what memory and arithmetic allow.

use std::fmt::Write;

use super::Report;

/// Width of the drawing, and its height without the legend, in pixels.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 530.0;
/// The plot's edges.
const LEFT: f64 = 90.0;
const RIGHT: f64 = 830.0;
const TOP: f64 = 70.0;
const BOTTOM: f64 = 470.0;
/// Heights of a line of text.
const LINE: f64 = 15.0;
const LEGEND_LINE: f64 = 22.0;
/// Width of a character, at most on average.
const CHARACTER: f64 = 7.0;
/// From a marker to its label.
const GAP: f64 = 12.0;
/// Part of a decade that is left below the lowest test, for labels.
const ROOM_BELOW: f64 = 0.6;

/// Colours of the reports, on white and on black; shapes tell them apart, too.
const COLORS: [[&str; 2]; 4] =
    [["#0969da", "#58a6ff"], ["#bc4c00", "#f0883e"], ["#8250df", "#bc8cff"], ["#1a7f37", "#3fb950"]];
/// Outlines of markers around the origin.
const MARKERS: [&str; 4] =
    ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-5-5H5V5H-5z", "M0-7L7 0L0 7L-7 0z", "M0-6L6 5H-6z"];

/// What one report shows.
#[derive(Debug, Clone)]
struct Series {
    name: String,
    /// Bytes a second.
    bandwidth: f64,
    /// Multiply-adds a second.
    peak: f64,
    points: Vec<Point>,
}

/// A test.
#[derive(Debug, Clone)]
struct Point {
    name: String,
    /// Multiply-adds for each byte.
    intensity: f64,
    /// Multiply-adds a second.
    rate: f64,
}

/// Draws the tests of reports of one model below the roofs of each, as an SVG file. `None` if there is a report without a peak, or whose
/// model is not in the memory that was measured.
pub fn roofline(reports: &[Report]) -> Option<String> {
    let series = reports.iter().map(Series::of).collect::<Option<Vec<_>>>()?;
    let model = reports.first()?;
    Some(draw(&model.name(), &model.model_fact(), &series))
}

impl Series {
    fn of(report: &Report) -> Option<Self> {
        let peak = report.peak.filter(|_| report.shares_memory)?;
        let points = report.measurements.iter().map(|measurement| Point {
            name: measurement.test.to_string(),
            intensity: measurement.work.intensity(),
            rate: measurement.multiply_adds_per_second(),
        });
        let (bandwidth, peak_rate) = (report.read_bandwidth.median, peak.rate.median);
        let device = &report.info.device;
        let name = format!(
            "{}: {}; memory is read at {:.1} GB/s, {} multiplied at {:.0} G/s",
            device.name,
            device.detail,
            bandwidth / 1e9,
            peak.numbers,
            peak_rate / 1e9
        );
        Some(Self { name, bandwidth, peak: peak_rate, points: points.collect() })
    }

    /// The most that is possible at an intensity.
    fn roof(&self, intensity: f64) -> f64 {
        (self.bandwidth * intensity).min(self.peak)
    }

    /// The intensity from which on memory is fast enough.
    fn ridge(&self) -> f64 {
        self.peak / self.bandwidth
    }
}

/// A logarithmic axis of whole decades.
#[derive(Debug, Clone, Copy)]
struct Axis {
    decades: [i32; 2],
    /// Where they begin and end in the drawing.
    pixels: [f64; 2],
}

impl Axis {
    /// With room for these values and so much of a decade below them.
    fn around(values: impl Iterator<Item = f64>, room_below: f64, pixels: [f64; 2]) -> Self {
        let [min, max] = values.fold([f64::INFINITY, f64::NEG_INFINITY], |[min, max], v| [min.min(v), max.max(v)]);
        let first = (min.log10() - room_below).floor() as i32;
        Self { decades: [first, (max.log10().ceil() as i32).max(first + 1)], pixels }
    }

    fn at(&self, value: f64) -> f64 {
        let [first, last] = self.decades.map(f64::from);
        let [begin, end] = self.pixels;
        begin + (value.log10() - first) / (last - first) * (end - begin)
    }

    /// The least value.
    fn first(&self) -> f64 {
        10f64.powi(self.decades[0])
    }

    /// The largest value.
    fn last(&self) -> f64 {
        10f64.powi(self.decades[1])
    }

    /// Powers of ten and where they are.
    fn ticks(self) -> impl Iterator<Item = (i32, f64)> {
        (self.decades[0]..=self.decades[1]).map(move |decade| (decade, self.at(10f64.powi(decade))))
    }
}

/// Both axes.
#[derive(Debug, Clone, Copy)]
struct Plot {
    x: Axis,
    y: Axis,
}

/// A label of a marker.
#[derive(Debug, Clone)]
struct Label {
    series: usize,
    text: String,
    marker: [f64; 2],
    /// Height at which it stands.
    y: f64,
}

impl Plot {
    fn of(series: &[Series]) -> Self {
        let points = || series.iter().flat_map(|series| &series.points);
        let intensities = points().map(|point| point.intensity).chain(series.iter().map(Series::ridge));
        let rates = points().map(|point| point.rate).chain(series.iter().map(|series| series.peak));
        Self { x: Axis::around(intensities, 0.0, [LEFT, RIGHT]), y: Axis::around(rates, ROOM_BELOW, [BOTTOM, TOP]) }
    }

    /// Where the roof of a series begins, bends, and ends.
    fn roof(&self, series: &Series) -> [[f64; 2]; 3] {
        // Where memory's share of the roof enters the plot: on the left, or from below.
        let begin = self.x.first().max(self.y.first() / series.bandwidth);
        [begin, series.ridge(), self.x.last()].map(|x| [self.x.at(x), self.y.at(series.roof(x))])
    }

    /// The labels, so far apart that they do not overlap, if there is room.
    fn labels(&self, series: &[Series]) -> Vec<Label> {
        let mut labels = Vec::new();
        for (index, series) in series.iter().enumerate() {
            for point in &series.points {
                let share = 100.0 * point.rate / series.roof(point.intensity);
                let marker = [self.x.at(point.intensity), self.y.at(point.rate)];
                labels.push(Label {
                    series: index,
                    text: format!("{}, {share:.0} %", point.name),
                    marker,
                    y: marker[1],
                });
            }
        }
        labels.sort_by(|a, b| a.y.total_cmp(&b.y));
        // Down to where the one above ends, and back up from the bottom.
        let mut least = TOP + LINE;
        for label in &mut labels {
            label.y = label.y.max(least);
            least = label.y + LINE;
        }
        let mut most = BOTTOM - LINE / 2.0;
        for label in labels.iter_mut().rev() {
            label.y = label.y.min(most).max(TOP);
            most = label.y - LINE;
        }
        labels
    }
}

impl Label {
    /// Where it begins: right of its marker, or left of it if there is no room.
    fn begin(&self) -> f64 {
        let right = self.marker[0] + GAP;
        if right + self.width() <= RIGHT { right } else { (self.marker[0] - GAP - self.width()).max(0.0) }
    }

    fn width(&self) -> f64 {
        self.text.chars().count() as f64 * CHARACTER
    }
}

fn draw(title: &str, description: &str, series: &[Series]) -> String {
    let plot = Plot::of(series);
    let height = HEIGHT + LEGEND_LINE * series.len() as f64;
    let mut svg = String::new();
    // Writing to a string does not fail.
    let _ = write_svg(&mut svg, &plot, height, [title, description].map(escape), series);
    svg
}

fn write_svg(
    svg: &mut String,
    plot: &Plot,
    height: f64,
    [title, description]: [String; 2],
    series: &[Series],
) -> std::fmt::Result {
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-labelledby=\"title description\">\n\
         <title id=\"title\">Roofline of {title}</title>\n\
         <desc id=\"description\">Multiply-adds a second of each test over multiply-adds for each byte that it reads, below what \
         memory and arithmetic allow. {description}</desc>"
    )?;
    write_style(svg)?;
    writeln!(
        svg,
        "<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"28\">Roofline of {title}</text>\n\
         <text x=\"{LEFT}\" y=\"50\">Labels give the share of the roof, which memory (rising) or arithmetic (level) makes.</text>"
    )?;
    write_axes(svg, plot)?;
    for (index, series) in series.iter().enumerate() {
        let [[x0, y0], [x1, y1], [x2, y2]] = plot.roof(series);
        let class = index % COLORS.len();
        writeln!(svg, "<path class=\"roof s{class}\" d=\"M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\"/>")?;
    }
    for label in plot.labels(series) {
        write_label(svg, &label)?;
    }
    for (index, series) in series.iter().enumerate() {
        let y = HEIGHT + LEGEND_LINE * index as f64;
        write_marker(svg, index, [LEFT, y])?;
        writeln!(svg, "<text x=\"{}\" y=\"{:.1}\">{}</text>", LEFT + GAP, y + 4.0, escape(&series.name))?;
    }
    writeln!(svg, "</svg>")
}

fn write_style(svg: &mut String) -> std::fmt::Result {
    let colors = |scheme: usize| -> String {
        let color = |(index, colors): (usize, &[&str; 2])| format!(" .s{index} {{ color: {} }}", colors[scheme]);
        COLORS.iter().enumerate().map(color).collect()
    };
    writeln!(
        svg,
        "<style>\n\
         text {{ font: 12px system-ui, sans-serif; fill: #1f2328 }} .title {{ font-size: 16px; font-weight: 600 }}\n\
         .paper {{ fill: #ffffff }} .grid {{ stroke: #d0d7de }} .edge {{ stroke: #59636e; fill: none }}\n\
         .roof {{ stroke: currentColor; stroke-width: 2; fill: none }} .marker {{ fill: currentColor }} .leader {{ stroke: currentColor; \
         stroke-width: 0.7 }}\n{}\n\
         @media (prefers-color-scheme: dark) {{\n\
         text {{ fill: #e6edf3 }} .paper {{ fill: #0d1117 }} .grid {{ stroke: #30363d }} .edge {{ stroke: #8b949e }}\n{}\n}}\n\
         </style>",
        colors(0),
        colors(1)
    )
}

fn write_axes(svg: &mut String, plot: &Plot) -> std::fmt::Result {
    for (decade, x) in plot.x.ticks() {
        writeln!(
            svg,
            "<path class=\"grid\" d=\"M{x:.1} {TOP}V{BOTTOM}\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 18.0,
            power_of_ten(decade)
        )?;
    }
    for (decade, y) in plot.y.ticks() {
        writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + 4.0,
            power_of_ten(decade)
        )?;
    }
    let (middle_x, middle_y) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
    writeln!(
        svg,
        "<rect class=\"edge\" x=\"{LEFT}\" y=\"{TOP}\" width=\"{}\" height=\"{}\"/>\n\
         <text x=\"{middle_x}\" y=\"{}\" text-anchor=\"middle\">multiply-adds for each byte read</text>\n\
         <text transform=\"translate(24 {middle_y}) rotate(-90)\" text-anchor=\"middle\">multiply-adds per second</text>",
        RIGHT - LEFT,
        BOTTOM - TOP,
        BOTTOM + 38.0
    )
}

fn write_label(svg: &mut String, label: &Label) -> std::fmt::Result {
    let [x, y] = label.marker;
    let begin = label.begin();
    write_marker(svg, label.series, label.marker)?;
    if (label.y - y).abs() > LINE / 2.0 {
        let class = label.series % COLORS.len();
        let end = if begin > x { begin - 2.0 } else { begin + label.width() };
        writeln!(svg, "<path class=\"leader s{class}\" d=\"M{x:.1} {y:.1}L{end:.1} {:.1}\"/>", label.y)?;
    }
    writeln!(svg, "<text x=\"{begin:.1}\" y=\"{:.1}\">{}</text>", label.y + 4.0, escape(&label.text))
}

fn write_marker(svg: &mut String, series: usize, [x, y]: [f64; 2]) -> std::fmt::Result {
    let (class, outline) = (series % COLORS.len(), MARKERS[series % MARKERS.len()]);
    writeln!(svg, "<path class=\"marker s{class}\" transform=\"translate({x:.1} {y:.1})\" d=\"{outline}\"/>")
}

/// `0.01`, `100`, `1 k`, `10 M`, `100 G`, `1 T`.
fn power_of_ten(exponent: i32) -> String {
    const PREFIXES: [&str; 5] = ["", " k", " M", " G", " T"];
    let thousands = exponent.div_euclid(3).clamp(0, 4);
    let number = 10f64.powi(exponent - 3 * thousands);
    format!("{number}{}", PREFIXES[thousands as usize])
}

/// Text as XML has it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, intensity: f64, rate: f64) -> Point {
        Point { name: name.into(), intensity, rate }
    }

    /// 10 GB/s and 1 T/s.
    fn series(points: Vec<Point>) -> Series {
        Series { name: "2 threads".into(), bandwidth: 1e10, peak: 1e12, points }
    }

    /// How far a point is from the line through two others.
    fn distance([x, y]: [f64; 2], [ax, ay]: [f64; 2], [bx, by]: [f64; 2]) -> f64 {
        ((bx - ax) * (y - ay) - (by - ay) * (x - ax)).abs() / (bx - ax).hypot(by - ay)
    }

    #[test]
    fn tests_that_reach_the_roof_lie_on_it() {
        let series = [series(vec![point("tg", 2.0, 2e10), point("pp", 500.0, 1e12), point("half", 2.0, 1e10)])];
        let plot = Plot::of(&series);
        let [begin, ridge, end] = plot.roof(&series[0]);
        let at = |point: &Point| [plot.x.at(point.intensity), plot.y.at(point.rate)];
        let [tg, pp, half] = [0, 1, 2].map(|i| at(&series[0].points[i]));
        assert!(distance(tg, begin, ridge) < 1e-9 && distance(pp, ridge, end) < 1e-9);
        assert!(half[1] > tg[1] + 10.0, "below it: {half:?}, {tg:?}");
        assert!(distance([plot.x.at(100.0), plot.y.at(1e12)], ridge, ridge.map(|v| v + 1.0)) < 1e-9);
        let labels = plot.labels(&series);
        let texts: Vec<&str> = labels.iter().map(|label| label.text.as_str()).collect();
        assert_eq!(texts, ["pp, 100 %", "tg, 100 %", "half, 50 %"]);
    }

    #[test]
    fn axes_are_whole_decades() {
        let axis = Axis::around([3.0, 70.0].into_iter(), 0.0, [0.0, 200.0]);
        assert_eq!((axis.decades, axis.at(1.0), axis.at(10.0), axis.at(100.0)), ([0, 2], 0.0, 100.0, 200.0));
        assert_eq!(Axis::around([10.0].into_iter(), 0.5, [0.0, 1.0]).decades, [0, 1]);
        let names: Vec<String> = [-2, 0, 2, 3, 10, 12, 15].map(power_of_ten).to_vec();
        assert_eq!(names, ["0.01", "1", "100", "1 k", "10 G", "1 T", "1000 T"]);
    }

    #[test]
    fn labels_stay_on_the_canvas_and_apart() {
        let name = "tg64 x32 @ d131072";
        for (intensity, rate) in [(1.7, 1e10), (999.0, 9.9e11), (999.0, 1e8), (1e-3, 1e7), (1.0, 1e12)] {
            let series = [series((0..12).map(|_| point(name, intensity, rate)).collect())];
            let labels = Plot::of(&series).labels(&series);
            for label in &labels {
                let (begin, width) = (label.begin(), label.width());
                assert!(begin >= 0.0 && begin + width <= WIDTH, "{label:?}");
                assert!(label.y - LINE / 2.0 >= 0.0 && label.y + LINE / 2.0 <= BOTTOM, "{label:?}");
            }
            assert!(labels.windows(2).all(|pair| pair[1].y - pair[0].y >= LINE - 1e-9), "{labels:?}");
        }
    }

    #[test]
    fn the_drawing_is_well_formed() {
        let series: Vec<Series> = (0..6).map(|_| series(vec![point("a<b & c>", 3.0, 1e10)])).collect();
        let svg = draw("a<b & \"c\">", "1 < 2", &series);
        let mut open = Vec::new();
        for piece in svg.split('<').skip(1) {
            let (tag, text) = piece.split_once('>').unwrap();
            assert!(!text.contains('>'), "{piece}");
            assert!(text.split('&').skip(1).all(|entity| ["amp;", "lt;", "gt;"].iter().any(|e| entity.starts_with(e))));
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{svg}");
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().unwrap());
            }
        }
        assert!(open.is_empty() && svg.starts_with("<svg ") && !svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("class=\"marker").count(), 12);
    }
}
