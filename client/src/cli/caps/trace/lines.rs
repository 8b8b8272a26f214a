//! Checks as lines, for people and for programs.

use std::fmt::Write as _;

use super::Args;
use super::observation::{Distinct, Observation};
use crate::cli::audit::utc;
use crate::cli::failure::Failure;
use crate::cli::output;

/// Printed from top to bottom, each line once.
pub(super) struct Lines {
    json: bool,
    stacks: bool,
    /// What was shown, where each kind is shown once.
    shown: Option<Distinct>,
}

impl Lines {
    pub(super) fn new(args: &Args) -> Result<Self, Failure> {
        if !args.json {
            output::print(&format_args!("{}\n", heading()))?;
        }
        Ok(Self { json: args.json, stacks: args.stacks, shown: args.unique.then(Distinct::default) })
    }

    pub(super) fn show(&mut self, new: &[Observation]) -> Result<(), Failure> {
        for check in new {
            if self.shown.as_mut().is_some_and(|shown| !shown.add(check.clone())) {
                continue;
            }
            if self.json {
                let mut value =
                    serde_json::to_value(check).map_err(|error| Failure::Failed(error.to_string()))?;
                if !self.stacks {
                    value["stack"] = serde_json::json!([]);
                }
                output::print_json_line(&value)?;
                continue;
            }
            let mut text = line(check) + "\n";
            if self.stacks {
                for function in &check.stack {
                    let _ = writeln!(text, "         {}", output::clean(function));
                }
            }
            output::print(&text)?;
        }
        Ok(())
    }
}

/// The columns. What comes last may be long.
pub(super) fn heading() -> String {
    row([
        "TIME", "UID", "PID", "TID", "COMM", "CAP", "NAME", "AUDIT", "VERDICT", "CLASS", "COUNT", "UNIT",
        "SYSCALL", "USERNS", "WHY",
    ])
}

/// One check on one line, with nothing in it that a terminal obeys.
pub(super) fn line(check: &Observation) -> String {
    let name = check.cap.strip_prefix("CAP_").unwrap_or(&check.cap);
    let unit = check.unit.clone().unwrap_or_else(|| format!("cgroup {}", check.cgroup_id));
    let mut syscall = check.syscall.clone().unwrap_or_else(|| "-".to_owned());
    if let Some(bpf) = &check.bpf {
        let kind = bpf.kind.as_ref().map_or(String::new(), |kind| format!(" {kind}"));
        let _ = write!(syscall, "({}{kind})", bpf.command);
    }
    let audit = match check.audit {
        Some(true) => "yes",
        Some(false) => "no",
        None => "?",
    };
    row([
        // Of 2026-11-22T18:00:00Z.
        utc(check.time).get(11..19).unwrap_or_default(),
        &check.uid.to_string(),
        &check.pid.to_string(),
        &check.tid.to_string(),
        &check.comm,
        &check.number.to_string(),
        name,
        audit,
        check.verdict.word(),
        check.class.word(),
        &check.count.to_string(),
        &unit,
        &syscall,
        // The initial one is where nearly all of them are: PROC_USER_INIT_INO of include/linux/proc_ns.h.
        &if check.userns == 0xefff_fffd { "initial".to_owned() } else { check.userns.to_string() },
        check.class_reason.as_deref().unwrap_or_default(),
    ])
}

fn row(cells: [&str; 15]) -> String {
    const WIDTHS: [usize; 15] = [8, 5, 7, 7, 15, 3, 18, 5, 8, 11, 6, 20, 28, 10, 0];
    let mut text = String::new();
    for (cell, width) in cells.iter().zip(WIDTHS) {
        let _ = write!(text, "{:width$}  ", output::clean(cell));
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::caps::trace::observation::{Verdict, example};

    #[test]
    fn a_line_says_all_of_it() {
        let text = line(&example());
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "18:00:00",
                "1000",
                "7",
                "8",
                "loader",
                "39",
                "BPF",
                "yes",
                "denied",
                "need",
                "3",
                "a.service",
                "bpf(PROG_LOAD",
                "xdp)",
                "4026531840"
            ]
        );
        let other = Observation {
            unit: None,
            syscall: None,
            bpf: None,
            audit: None,
            userns: 0xefff_fffd,
            verdict: Verdict::Unknown,
            ..example()
        };
        let text = line(&other);
        for part in ["cgroup 4711", "  ?  ", "initial", "  -  "] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }

    #[test]
    fn a_name_of_a_process_moves_nothing() {
        let text = line(&Observation { comm: "\x1b[2J\n\r".into(), ..example() });
        assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
    }
}
