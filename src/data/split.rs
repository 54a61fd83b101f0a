//! Which classes a data set has and which images it holds out, found in names and labels.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::SplitChoice;
use super::source::Source;
use crate::random::{self, Purpose};

const TRAIN_FOLDERS: &[&str] = &["train", "training"];
const HELD_OUT_FOLDERS: &[&str] = &["val", "valid", "validation", "test"];

/// Which images are held out for evaluation, and why.
#[derive(Clone, Debug, PartialEq)]
pub enum Split {
    /// The data set has folders for both.
    Own {
        /// Name of the held-out folder.
        held_out: String,
    },
    /// A share of each class, drawn with the run's seed.
    Stratified {
        /// The share.
        held_out: f64,
        /// Whether it is drawn from a folder of training images, and the one beside it, held out by default, is left alone.
        of_train_folder: bool,
    },
    /// Nothing is held out: there are no classes to score.
    None,
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Role {
    /// It keeps its number and is never asked for.
    Unreadable,
    Train,
    HeldOut,
    /// In neither folder of a data set that has folders for both.
    Neither,
}

/// What names and labels say.
pub(super) struct Groups {
    /// Class names; none where there are fewer than two.
    pub classes: Vec<String>,
    /// Class of each image, an index into `classes`.
    pub labels: Vec<Option<u32>>,
    own: Option<OwnSplit>,
}

struct OwnSplit {
    held_out: String,
    roles: Vec<Role>,
}

impl Groups {
    /// Of the images that are `in_use`; the others have no class.
    pub fn of(source: &Source, in_use: &[bool]) -> Self {
        let count = source.entries.len();
        let name = |image: usize| &*source.entries[image].name;
        let used = || (0..count).filter(|&image| in_use[image]);
        let shared = shared_folders(used().map(name));
        let top_folders: BTreeSet<&str> = used()
            .filter_map(|image| folder_of(name(image), shared))
            .collect();
        let own_folder = |choices: &[&str]| {
            let found = choices.iter().find(|choice| top_folders.contains(**choice));
            found.map(|choice| (*choice).to_owned())
        };
        let own = own_folder(TRAIN_FOLDERS)
            .zip(own_folder(HELD_OUT_FOLDERS))
            .map(|(train, held_out)| OwnSplit {
                roles: roles_of(in_use, |image| match folder_of(name(image), shared) {
                    Some(folder) if folder == train => Role::Train,
                    Some(folder) if folder == held_out => Role::HeldOut,
                    _ => Role::Neither,
                }),
                held_out,
            });
        let class_depth = shared + usize::from(own.is_some());
        let beside = source.classes_beside();
        let class_of = |image: usize| {
            if beside.is_empty() {
                folder_of(name(image), class_depth)
            } else {
                source.entries[image].label.map(|label| beside[&label])
            }
        };
        let found: BTreeSet<&str> = used().filter_map(class_of).collect();
        let mut classes: Vec<&str> = found.into_iter().collect();
        // Labels that are numbers keep their order as numbers.
        if classes.iter().all(|class| class.parse::<u64>().is_ok()) {
            classes.sort_by_key(|class| class.parse::<u64>().ok());
        }
        if classes.len() < 2 {
            classes.clear();
        }
        let numbers: HashMap<&str, u32> = classes.iter().copied().zip(0..).collect();
        let labels = (0..count)
            .map(|image| {
                let class = class_of(image).filter(|_| in_use[image])?;
                numbers.get(class).copied()
            })
            .collect();
        Self {
            classes: classes.into_iter().map(str::to_owned).collect(),
            labels,
            own,
        }
    }

    /// What each image is for: as its folder says, else, or where `choice` says so, with a share of each class held out.
    pub fn split(
        &mut self,
        in_use: &[bool],
        choice: SplitChoice,
        share: f64,
        seed: u64,
    ) -> (Vec<Role>, Split) {
        let of_train_folder = self.own.is_some();
        let mut roles = match self.own.take() {
            Some(OwnSplit { held_out, roles }) if choice == SplitChoice::Own => {
                return (roles, Split::Own { held_out });
            }
            Some(OwnSplit { mut roles, .. }) => {
                for role in roles.iter_mut().filter(|role| **role == Role::HeldOut) {
                    *role = Role::Neither;
                }
                roles
            }
            None => roles_of(in_use, |_| Role::Train),
        };
        if self.classes.is_empty() || share == 0.0 {
            return (roles, Split::None);
        }
        let labels: Vec<Option<u32>> = self
            .labels
            .iter()
            .zip(&roles)
            .map(|(label, role)| label.filter(|_| *role == Role::Train))
            .collect();
        for image in stratified(&labels, share, seed) {
            roles[image] = Role::HeldOut;
        }
        let split = Split::Stratified {
            held_out: share,
            of_train_folder,
        };
        (roles, split)
    }
}

fn roles_of(in_use: &[bool], role: impl Fn(usize) -> Role) -> Vec<Role> {
    let images = in_use.iter().enumerate();
    images
        .map(|(image, used)| if *used { role(image) } else { Role::Unreadable })
        .collect()
}

/// The folder at this depth of a file's path, where the file lies at least that deep.
fn folder_of(name: &str, depth: usize) -> Option<&str> {
    let mut parts = name.split('/').skip(depth);
    let folder = parts.next()?;
    parts.next().map(|_| folder)
}

/// How many leading folders all images share, as in `cifar10/train/…` and `cifar10/test/…`: one. A folder that holds
/// the images themselves is never shared away.
fn shared_folders<'a>(mut names: impl Iterator<Item = &'a str>) -> usize {
    let Some(first) = names.next() else {
        return 0;
    };
    let folders = |name: &'a str| name.split('/').take(name.matches('/').count());
    names.fold(folders(first).count(), |shared, name| {
        let pairs = folders(first).zip(folders(name)).take(shared);
        pairs.take_while(|(a, b)| a == b).count()
    })
}

/// The same share of each class, at least one image where it has two.
fn stratified(labels: &[Option<u32>], share: f64, seed: u64) -> Vec<usize> {
    let mut of_class: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for index in random::permutation(seed, Purpose::Split, 0, labels.len()) {
        if let Some(label) = labels[index] {
            of_class.entry(label).or_default().push(index);
        }
    }
    let chosen = of_class.into_values().flat_map(|mut members| {
        let wanted = (members.len() as f64 * share).round() as usize;
        let least = usize::from(members.len() > 1);
        members.truncate(wanted.clamp(least, members.len() - 1));
        members
    });
    chosen.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stratified_split_takes_the_same_share_of_each_class() {
        let mut labels: Vec<Option<u32>> = (0..100).map(|i| Some(u32::from(i % 4 == 0))).collect();
        labels.extend([None; 10]);
        let held_out = stratified(&labels, 0.2, 7);
        let of_class = |class| held_out.iter().filter(|&&i| labels[i] == class).count();
        assert_eq!(
            [of_class(Some(0)), of_class(Some(1)), of_class(None)],
            [15, 5, 0]
        );
        assert_eq!(stratified(&labels, 0.2, 7), held_out);
        assert_ne!(stratified(&labels, 0.2, 8), held_out);
    }

    #[test]
    fn only_folders_above_all_images_are_shared() {
        let shared = |names: &[&'static str]| shared_folders(names.iter().copied());
        assert_eq!(shared(&["c/train/a/1.jpg", "c/test/a/1.jpg"]), 1);
        assert_eq!(shared(&["a/1.jpg", "b/1.jpg"]), 0);
        assert_eq!(shared(&["1.jpg", "a/1.jpg"]), 0);
        assert_eq!(shared(&["a/b/1.jpg", "a/b/2.jpg"]), 2);
    }
}
