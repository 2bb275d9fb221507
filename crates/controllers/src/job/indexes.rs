//! Sets of indexes as a Job's status writes them: `1,3-5,7`. Pure.

use std::collections::BTreeSet;

/// Reads a set; what is no index is left out.
pub fn parse(text: &str) -> BTreeSet<i32> {
    let mut set = BTreeSet::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
            set.extend(first..=last);
        }
    }
    set
}

/// Writes a set; runs of two and more as ranges.
pub fn print(set: &BTreeSet<i32>) -> String {
    let mut runs: Vec<(i32, i32)> = Vec::new();
    for index in set {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => runs.push((*index, *index)),
        }
    }
    let shown: Vec<String> = runs
        .into_iter()
        .map(|(first, last)| match last - first {
            0 => first.to_string(),
            1 => format!("{first},{last}"),
            _ => format!("{first}-{last}"),
        })
        .collect();
    shown.join(",")
}

/// How many indexes a set holds.
pub fn count(text: &str) -> i32 {
    parse(text).len() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_written() {
        for text in ["", "0", "0,1", "0-2", "1,3-5,7"] {
            assert_eq!(print(&parse(text)), text);
        }
        assert_eq!(parse("x,2-y,4"), BTreeSet::from([4]));
        assert_eq!(count("1,3-5,7"), 5);
    }
}
