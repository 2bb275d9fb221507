//! The ARM front door over the home cluster: what `az`, the Azure SDKs and Terraform talk to.
//!
//! A request becomes plain data ([`server`]), its path a [`path::Route`], its token is checked ([`token`]), and a handler reads
//! or writes objects of the home cluster ([`home`]): the body as it was sent, merged on the way out with what the platform
//! knows ([`render`]). Checks happen before anything changes ([`validate`]). Long-running work is nobody's thread here:
//! controllers act on the objects, and an operation's state is read off its object. Beside the front door run the
//! controllers of what ARM itself owns: addresses ([`network`]) and the deletion of resource groups ([`groups`]).
//!
//! It knows no Kubernetes cluster but home; what needs one comes through [`Actions`].

mod app;
pub mod az;
mod catalog;
mod deployment;
mod dispatch;
pub mod error;
pub mod filter;
mod group_api;
pub mod groups;
pub mod home;
pub mod http;
pub mod metadata;
pub mod network;
mod network_actions;
mod operations;
pub mod path;
pub mod private_dns;
mod rbac;
pub mod render;
mod resource;
pub mod server;
pub mod table;
pub mod token;
pub mod validate;
pub mod version;

pub use app::{ActionError, Actions, Identity, StartError, token_key};
pub use server::{ArmConfig, Server, TlsSource, serve};
pub use token::ServicePrincipal;
