//! `bpfgate status`.

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;

use super::failure::Failure;
use super::output::{self, Style, Table};
use super::{Outcome, connect};

/// The interface that a broker must speak.
const INTERFACE: &str = "io.bpfgate";

pub(crate) fn run(socket: Option<&Path>, style: Style) -> Outcome {
    let info = connect(socket)?.service_info()?;
    let speaks = info.interfaces.iter().any(|interface| interface == INTERFACE);
    match style {
        Style::Json => {
            let mut value = json!({"answers": speaks});
            value["service"] =
                serde_json::to_value(&info).map_err(|error| Failure::Failed(error.to_string()))?;
            output::print_json(&value)?;
        }
        Style::Table => {
            let mut table = Table::new(["BROKER", if speaks { "answers" } else { "is another service" }]);
            table.row([&"vendor", &info.vendor]);
            table.row([&"product", &info.product]);
            table.row([&"version", &info.version]);
            table.row([&"interfaces", &info.interfaces.join(" ")]);
            output::print(&table)?;
        }
    }
    if speaks {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::Failed(format!("the service on this socket does not speak {INTERFACE}")))
}
