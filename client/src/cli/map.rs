//! `bpfgate map dump`, `get` and `set`.

use std::path::Path;
use std::process::ExitCode;

use bpfgate_client::{Access, Client, Map, MapGrant, UpdateMode};
use serde_json::{Value, json};

use super::args::{DumpArgs, GetArgs, MapName, SetArgs};
use super::failure::Failure;
use super::number::{Format, join, numbers_json, words};
use super::output::{self, Style, Table};
use super::{Outcome, open};

/// How the values of a map are shown.
#[derive(Clone, Copy, Debug)]
struct View {
    format: Format,
    /// Bytes of one CPU's value and their distance, for a per-CPU map.
    per_cpu: Option<(usize, usize)>,
    sum: bool,
}

/// Where the entries are read.
enum Source {
    Descriptor(Map),
    Broker(Client),
}

pub(crate) fn dump(socket: Option<&Path>, args: &DumpArgs) -> Outcome {
    let (grant, client) = find(socket, &args.name)?;
    let view = View::new(&grant, args.name.format, args.sum)?;
    let entries = match source(grant, client)? {
        Source::Descriptor(map) => map.entries()?.into_iter().map(|pair| (pair.key, pair.value)).collect(),
        Source::Broker(mut client) => {
            let entries = client.read_map(args.name.instance, &args.name.map);
            entries.map(|entry| entry.map(|entry| (entry.key, entry.value))).collect::<Result<Vec<_>, _>>()?
        }
    };
    view.print(&entries, (&args.style).into())
}

pub(crate) fn get(socket: Option<&Path>, args: &GetArgs) -> Outcome {
    let (grant, client) = find(socket, &args.name)?;
    let view = View::new(&grant, args.name.format, args.sum)?;
    let key = parse("key", &args.key, args.name.format, grant.key_size)?;
    let value = match source(grant, client)? {
        Source::Descriptor(map) => map.lookup(&key)?,
        // The interface has no call for one key: a map that is read so is small.
        Source::Broker(mut client) => client
            .read_map(args.name.instance, &args.name.map)
            .find(|entry| entry.as_ref().map_or(true, |entry| entry.key == key))
            .transpose()?
            .map(|entry| entry.value),
    };
    match value {
        Some(value) => view.print(&[(key, value)], (&args.style).into()),
        None => Err(Failure::Failed(format!("the map {} has no key {}", args.name.map, args.key))),
    }
}

pub(crate) fn set(socket: Option<&Path>, args: &SetArgs) -> Outcome {
    let (grant, _client) = find(socket, &args.name)?;
    if grant.access != Access::ReadWrite {
        let (map, access) = (&args.name.map, grant.access.as_str());
        let sentence = format!("the map {map} cannot be written: its access is {access}, not read_write");
        return Err(Failure::Failed(sentence));
    }
    let key = parse("key", &args.key, args.name.format, grant.key_size)?;
    let value = parse("value", &args.value, args.name.format, grant.value_size)?;
    let map = grant.into_map()?;
    map.update(&key, &for_every_cpu(&map, value)?, UpdateMode::Any)?;
    Ok(ExitCode::SUCCESS)
}

/// A per-CPU map takes one value for each possible CPU, padded to 8 bytes.
fn for_every_cpu(map: &Map, mut value: Vec<u8>) -> Result<Vec<u8>, Failure> {
    if !map.info().kind.is_per_cpu() {
        return Ok(value);
    }
    value.resize(value.len().next_multiple_of(8), 0);
    Ok(value.repeat(bpfgate_client::possible_cpus()?))
}

fn find(socket: Option<&Path>, name: &MapName) -> Result<(MapGrant, Client), Failure> {
    let mut client = open(socket, &name.app)?;
    let grant = client.map(name.instance, &name.map)?;
    Ok((grant, client))
}

fn source(grant: MapGrant, client: Client) -> Result<Source, Failure> {
    match grant.fd {
        Some(_) => Ok(Source::Descriptor(grant.into_map()?)),
        None => Ok(Source::Broker(client)),
    }
}

fn parse(what: &str, text: &str, format: Format, size: u32) -> Result<Vec<u8>, Failure> {
    format.parse(text, size as usize).map_err(|error| Failure::Usage(format!("the {what} {error}")))
}

impl View {
    fn new(grant: &MapGrant, format: Format, sum: bool) -> Result<Self, Failure> {
        let size = grant.value_size as usize;
        let per_cpu = grant.kind.contains("percpu").then(|| (size, size.next_multiple_of(8)));
        if sum && (per_cpu.is_none() || !size.is_multiple_of(8)) {
            let sentence = "--sum adds u64 values over CPUs, and this map has none".to_owned();
            return Err(Failure::Usage(sentence));
        }
        Ok(Self { format, per_cpu, sum })
    }

    fn print(self, entries: &[(Vec<u8>, Vec<u8>)], style: Style) -> Outcome {
        match style {
            Style::Json => {
                let entries = entries.iter().map(|(key, value)| self.json(key, value));
                output::print_json(&entries.collect())?;
            }
            Style::Table if self.per_cpu.is_some() && !self.sum => {
                let mut table = Table::new(["KEY", "CPU", "VALUE"]);
                for (key, value) in entries {
                    for (cpu, value) in self.cpus(value).enumerate() {
                        table.row([&self.format.text(key), &cpu, &self.format.text(value)]);
                    }
                }
                output::print(&table)?;
            }
            Style::Table => {
                let mut table = Table::new(["KEY", "VALUE"]);
                for (key, value) in entries {
                    let value = if self.sum { join(&self.summed(value)) } else { self.format.text(value) };
                    table.row([&self.format.text(key), &value]);
                }
                output::print(&table)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    fn json(self, key: &[u8], value: &[u8]) -> Value {
        let key = self.format.json(key);
        if self.sum {
            json!({"key": key, "value": numbers_json(&self.summed(value))})
        } else if self.per_cpu.is_some() {
            let values: Vec<_> = self.cpus(value).map(|value| self.format.json(value)).collect();
            json!({"key": key, "values": values})
        } else {
            json!({"key": key, "value": self.format.json(value)})
        }
    }

    fn cpus(self, value: &[u8]) -> impl Iterator<Item = &[u8]> {
        let (size, stride) = self.per_cpu.unwrap_or((value.len(), value.len()));
        value.chunks_exact(stride.max(1)).map(move |chunk| &chunk[..size])
    }

    /// The sums of each 8-byte word; they wrap as the counters themselves do.
    fn summed(self, value: &[u8]) -> Vec<u64> {
        let mut sums: Vec<u64> = Vec::new();
        for value in self.cpus(value) {
            let words = words(value);
            sums.resize(words.len(), 0);
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = sum.wrapping_add(word);
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn cpus_are_summed_word_by_word() {
        let view = View { format: Format::U64, per_cpu: Some((16, 16)), sum: true };
        let value = bytes(&[1, 100, 2, 200, u64::MAX, 300]);
        assert_eq!(view.summed(&value), [2, 600]);
        let zero = 0u64.to_ne_bytes();
        assert_eq!(view.json(&zero, &value), json!({"key": 0, "value": [2, 600]}));
    }

    #[test]
    fn the_padding_of_a_cpu_is_not_shown() {
        let view = View { format: Format::U32, per_cpu: Some((4, 8)), sum: false };
        let value = bytes(&[u64::from_ne_bytes([1, 0, 0, 0, 9, 9, 9, 9]), 0]);
        let first = u32::from_ne_bytes([1, 0, 0, 0]);
        assert_eq!(view.json(&[0; 4], &value), json!({"key": 0, "values": [first, 0]}));
    }
}
