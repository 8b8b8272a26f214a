//! The table: each key with its aim and the verdict; and the medians behind them.

use serde_json::{Map, Value, json};
use std::fmt;

/// A measured key.
struct Row {
    key: &'static str,
    value: f64,
    /// Digits after the point.
    digits: usize,
    /// The value may be as much, not more.
    aim: f64,
    remark: &'static str,
}

/// A median, or another figure, that a key was computed from or that explains it.
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    samples: usize,
}

/// Everything that was measured.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    figures: Vec<Figure>,
}

impl Table {
    pub(crate) fn row(
        &mut self,
        key: &'static str,
        value: f64,
        digits: usize,
        aim: f64,
        remark: &'static str,
    ) {
        self.rows.push(Row { key, value: rounded(value, digits), digits, aim, remark });
    }

    /// Adds the median of samples; gives it back.
    pub(crate) fn median(&mut self, name: &'static str, unit: &'static str, samples: &[f64]) -> f64 {
        let value = median(samples);
        self.figures.push(Figure { name, value: rounded(value, 2), unit, samples: samples.len() });
        value
    }

    /// What `target/bench.json` holds.
    pub(crate) fn json(&self) -> String {
        let mut all: Map<String, Value> =
            self.rows.iter().map(|row| (row.key.to_owned(), number(row.value))).collect();
        let figure = |f: &Figure| {
            let value = json!({"value": number(f.value), "unit": f.unit, "samples": f.samples});
            (f.name.to_owned(), value)
        };
        all.insert("medians".to_owned(), self.figures.iter().map(figure).collect::<Map<_, _>>().into());
        format!("{:#}\n", Value::from(all))
    }
}

/// The middle of the samples, outliers included.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn rounded(value: f64, digits: usize) -> f64 {
    format!("{value:.digits$}").parse().unwrap_or(value)
}

/// Whole numbers without a point.
fn number(value: f64) -> Value {
    let text = format!("{value}");
    text.parse::<i64>().map_or_else(|_| json!(value), Value::from)
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<22} {:>10} {:>9}  VERDICT", "KEY", "VALUE", "AIM")?;
        for Row { key, value, digits, aim, remark } in &self.rows {
            // The rounded value is compared: what is printed decides. A value that is no number misses.
            let verdict = if value <= aim { "ok" } else { "MISSED" };
            let aim = format!("<= {aim}");
            writeln!(
                f,
                "{}",
                format_args!("{key:<22} {value:>10.digits$} {aim:>9}  {verdict:<6}  {remark}")
                    .to_string()
                    .trim_end()
            )?;
        }
        writeln!(f, "\n{:<28} {:>10} {:<6} {:>8}", "MEDIANS BEHIND THEM", "VALUE", "UNIT", "SAMPLES")?;
        for Figure { name, value, unit, samples } in &self.figures {
            writeln!(f, "{name:<28} {value:>10} {unit:<6} {samples:>8}")?;
        }
        Ok(())
    }
}
