//! Brings a planned table into a network namespace: one transaction, and only if something differs.

use std::{net::Ipv4Addr, path::PathBuf};

use linux::{
    netlink::{self, Address, Request, Route},
    netns,
    nft::{self, Change, Family, Nft, Table},
};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ExecutorError {
    #[error("opening the namespace of the Service rules")]
    Namespace {
        #[source]
        source: netns::Error,
    },
    #[error("opening the nftables socket of the Service rules")]
    Open {
        #[source]
        source: nft::Error,
    },
    #[error("applying table {table}")]
    Apply {
        table: String,
        #[source]
        source: nft::Error,
    },
    #[error("putting {address} on the loopback device")]
    Address {
        address: Ipv4Addr,
        #[source]
        source: netlink::Error,
    },
}

/// The one writer of a table. Blocking; calls take milliseconds.
pub struct Executor {
    nft: Nft,
    applied: Option<Table>,
}

impl Executor {
    /// In the namespace pinned at `netns`, or in the calling thread's.
    pub fn open(netns: Option<&PathBuf>) -> Result<Self, ExecutorError> {
        let nft = match netns {
            None => Nft::open(),
            Some(path) => Nft::open_in(&netns::open(path).map_err(|source| ExecutorError::Namespace { source })?),
        };
        Ok(Self {
            nft: nft.map_err(|source| ExecutorError::Open { source })?,
            applied: None,
        })
    }

    /// Makes the kernel's table this one.
    pub fn apply(&mut self, table: Table) -> Result<Change, ExecutorError> {
        if self.applied.as_ref() == Some(&table) {
            return Ok(Change::None);
        }
        let name = table.name.clone();
        let outcome = match self.applied.take() {
            // If the table is not what it was left as, it is made anew below.
            Some(old) => self.nft.update(&old, &table).or_else(|_| self.nft.ensure(&table)),
            None => self.nft.ensure(&table),
        };
        let change = outcome.map_err(|source| ExecutorError::Apply { table: name, source })?;
        self.applied = Some(table);
        Ok(change)
    }

    /// Restores the table if somebody removed or replaced it.
    pub fn verify(&mut self) -> Result<Change, ExecutorError> {
        let Some(table) = &self.applied else {
            return Ok(Change::None);
        };
        self.nft.ensure(table).map_err(|source| ExecutorError::Apply {
            table: table.name.clone(),
            source,
        })
    }

    /// Removes a table; success if there is none.
    pub fn remove(&mut self, table: &str) -> Result<(), ExecutorError> {
        self.applied = None;
        let fail = |source| ExecutorError::Apply {
            table: table.to_owned(),
            source,
        };
        self.nft.delete_table(Family::Ip, table).map_err(fail)
    }
}

/// Puts `address` on `lo` of the namespace, so that sockets can be bound to it and packets for it end there.
/// Idempotent.
pub fn own_address(netns: Option<&PathBuf>, address: Ipv4Addr) -> Result<(), ExecutorError> {
    let fail = |source| ExecutorError::Address { address, source };
    let mut route = match netns {
        None => Route::open(),
        Some(path) => Route::open_in(&netns::open(path).map_err(|source| ExecutorError::Namespace { source })?),
    }
    .map_err(fail)?;
    let lo = route.need_link("lo").map_err(fail)?.index;
    let address = Address {
        link: lo,
        address: std::net::IpAddr::V4(address).into(),
        no_prefix_route: false,
    };
    route
        .run_all(&[Request::set_up(lo, true), Request::add_address(&address)])
        .map_err(fail)
}
