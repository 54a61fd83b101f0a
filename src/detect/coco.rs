//! COCO's annotation files: which boxes are in which image.
//!
//! A data set is a JSON file and a folder or `.tar` of images, or one `.tar` or folder that holds both
//! ([`Origin`](super::Origin)). Boxes are `[left, top, width, height]` in pixels of the picture as it is decoded:
//! upright, as its EXIF orientation says.
//!
//! What cannot be meant as it stands becomes a [`Finding`] with the id and the file, and is counted:
//!
//! | what is wrong | what becomes of it |
//! |---|---|
//! | no JSON, no list `images`, `annotations` or `categories`, a category without id or name | the file is refused |
//! | a category id given twice, or two categories in use with one name | the file is refused |
//! | an image id given to two files | the file is refused: their boxes cannot be told apart |
//! | no box is left | the file is refused |
//! | more images missing, unreadable or of another shape than `data.max_bad_share` | the file is refused |
//! | an image record without id or file name, or there twice | it is left out |
//! | a file listed under two image ids | it is one image with the boxes of both, equal ones once |
//! | an image that is missing or cannot be read | it is left out, with its boxes |
//! | an image of another size than stated, of the same shape | its boxes are scaled |
//! | … of another shape, for example stated before an EXIF rotation | it is left out, with its boxes |
//! | an annotation without image, category or box, or of an image or category that is not there | it is left out |
//! | an annotation id given twice | a copy is left out, another box is kept |
//! | a box with a NaN, infinite, negative or zero side | it is left out |
//! | a box that reaches beyond its image | it is clipped; left out where less than a pixel remains |
//! | more boxes in an image than AP looks at | they are kept |
//! | a crowd | it is kept for AP, which ignores what falls onto it, and not trained on |
//! | an image without boxes | it is kept: nothing is to be found there |

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Boxes of one image that COCO's AP looks at.
pub const MOST_BOXES: usize = 100;
/// Pixels that are no more than the rounding of whoever wrote them: a reach beyond the image, or a side.
const ROUNDING: f64 = 0.01;
/// Findings of a kind that are listed for people.
const LISTED: usize = 5;

/// A kind of object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// COCO's category id.
    pub id: u64,
    /// Its name; no two classes of a set share one.
    pub name: String,
}

/// A box that a person drew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrueBox {
    /// COCO's annotation id, where there is one.
    pub annotation: Option<u64>,
    /// Number of its class.
    pub class: usize,
    /// `[left, top, width, height]` in pixels, finite, within the picture, sides above 0.
    pub bbox: [f64; 4],
    /// Square pixels of the object, which may be fewer than those of the box.
    pub area: f64,
    /// Many objects in one box: ignored in training and in AP.
    pub crowd: bool,
}

/// An image and what is on it.
#[derive(Clone, Debug)]
pub struct AnnotatedImage {
    /// COCO's image id.
    pub id: u64,
    /// File name as the annotations have it.
    pub name: String,
    /// Pixels a row of the decoded picture.
    pub width: u32,
    /// Rows of it.
    pub height: u32,
    /// What is to be found, and crowds.
    pub boxes: Vec<TrueBox>,
    /// Number of the picture.
    pub(super) entry: usize,
}

/// Something that could not be meant as it stood.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What sort of thing.
    pub kind: Kind,
    /// The record: `image 3`, `annotation 17`, `category 2`.
    pub record: String,
    /// The image's file; empty where it is not known or none is meant.
    pub file: String,
    /// What is wrong, and what became of it.
    pub message: String,
}

/// Sorts of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Kind {
    ImageBroken,
    ImageTwice,
    ImageUnderTwoIds,
    ImageMissing,
    ImageUnreadable,
    ImageOfAnotherShape,
    ImageOfAnotherSize,
    CategoryTwice,
    CategoryMoved,
    CategoryUnknown,
    ImageUnknown,
    AnnotationBroken,
    AnnotationTwice,
    BoxBroken,
    BoxOutside,
    BoxClipped,
    ManyBoxes,
}

impl Kind {
    /// For people, as a heading above the findings.
    pub fn title(self) -> &'static str {
        match self {
            Self::ImageBroken => "image records without id or file name, left out",
            Self::ImageTwice => "image records that are there twice, the second left out",
            Self::ImageUnderTwoIds => {
                "files listed under two image ids, taken as one image with the boxes of both"
            }
            Self::ImageMissing => "images that are missing, left out with their boxes",
            Self::ImageUnreadable => "images that cannot be read, left out with their boxes",
            Self::ImageOfAnotherShape => {
                "images of another shape than stated, left out with their boxes"
            }
            Self::ImageOfAnotherSize => "images of another size than stated, their boxes scaled",
            Self::CategoryTwice => "category names that are there twice, the unused one left out",
            Self::CategoryMoved => "categories with another id than in training, matched by name",
            Self::CategoryUnknown => "categories that are not known, their boxes left out",
            Self::ImageUnknown => "annotations of images that are not listed, left out",
            Self::AnnotationBroken => "annotations that lack what they need, left out",
            Self::AnnotationTwice => "annotation ids that are there twice",
            Self::BoxBroken => "boxes that are none, left out",
            Self::BoxOutside => "boxes outside their image, left out",
            Self::BoxClipped => "boxes that reach beyond their image, clipped",
            Self::ManyBoxes => "images with more boxes than AP looks at, kept",
        }
    }

    /// Whether it leaves an image out.
    pub(super) fn is_bad_image(self) -> bool {
        matches!(
            self,
            Self::ImageMissing | Self::ImageUnreadable | Self::ImageOfAnotherShape
        )
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.file.as_str() {
            "" => write!(f, "{}: {}", self.record, self.message),
            file => write!(f, "{} ({file}): {}", self.record, self.message),
        }
    }
}

/// The file as it is written. What is not needed, such as outlines, is passed over; what has another type than it
/// should is looked at record by record.
#[derive(Deserialize)]
#[serde(expecting = "an object with the lists images, annotations and categories")]
pub(super) struct Document {
    images: Vec<ImageRecord>,
    annotations: Vec<AnnotationRecord>,
    categories: Vec<CategoryRecord>,
}

#[derive(Default, Deserialize)]
#[serde(default, expecting = "an image, an object with id and file_name")]
struct ImageRecord {
    id: Value,
    file_name: Value,
    width: Value,
    height: Value,
}

#[derive(Default, Deserialize)]
#[serde(
    default,
    expecting = "an annotation, an object with image_id, category_id and bbox"
)]
struct AnnotationRecord {
    id: Value,
    image_id: Value,
    category_id: Value,
    bbox: Value,
    area: Value,
    iscrowd: Value,
}

#[derive(Default, Deserialize)]
#[serde(default, expecting = "a category, an object with id and name")]
struct CategoryRecord {
    id: Value,
    name: Value,
}

impl Document {
    /// An error where it is not COCO's.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        serde_json::from_slice(text)
            .or_else(|error| match error.is_syntax() {
                true => serde_json::from_slice(&without_nan(text)).map_err(|_| error),
                false => Err(error),
            })
            .map_err(|error| {
                format!(
                    "is not COCO's JSON ({error}); it is an object with the lists images, annotations and categories"
                )
            })
    }
}

/// Python writes NaN and infinite numbers as words that JSON does not have; they become `null`.
fn without_nan(text: &[u8]) -> Vec<u8> {
    let mut clean = Vec::with_capacity(text.len());
    let (mut at, mut quoted) = (0, false);
    while at < text.len() {
        let words: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
        let word = words.iter().find(|word| text[at..].starts_with(word));
        if let Some(word) = word.filter(|_| !quoted) {
            clean.extend(b"null");
            at += word.len();
            continue;
        }
        let taken = match text[at] {
            b'\\' if quoted => 2,
            b'"' => {
                quoted = !quoted;
                1
            }
            _ => 1,
        };
        let until = text.len().min(at + taken);
        clean.extend(&text[at..until]);
        at = until;
    }
    clean
}

/// An id: a whole number from 0 up, also where it is written as 3.0.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        let is_whole = number >= 0.0 && number.fract() == 0.0 && number < 2f64.powi(53);
        is_whole.then_some(number as u64)
    })
}

/// `image 3`, or by its place in the list where it has no id.
fn record(what: &str, id: Option<u64>, place: usize) -> String {
    match id {
        Some(id) => format!("{what} {id}"),
        None => format!("{what} without id, number {} of the list", place + 1),
    }
}

/// An image that is there.
#[derive(Clone, Copy)]
pub(super) struct Found {
    /// Number of the picture.
    pub entry: usize,
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// What is wrong with a record.
pub(super) type Fault = (Kind, String);

/// What a document says of the images that are there.
pub(super) struct Resolved {
    pub images: Vec<AnnotatedImage>,
    pub classes: Vec<Class>,
    /// Sorted by kind.
    pub findings: Vec<Finding>,
}

/// What is listed under an image id.
struct Listed {
    name: String,
    place: Place,
    /// Annotations that go with an image left out.
    lost: usize,
}

/// Where an image id leads.
enum Place {
    /// To an image in use; its boxes are scaled so along x and y.
    Used(usize, [f64; 2]),
    /// To one that is left out.
    LeftOut(Fault),
}

impl Document {
    /// File name of each image record, empty where it has none.
    pub fn file_names(&self) -> impl Iterator<Item = &str> {
        let records = self.images.iter();
        records.map(|image| image.file_name.as_str().unwrap_or_default())
    }

    /// `found` has an entry for each image record, in order.
    pub fn resolve(&self, found: Vec<Result<Found, Fault>>) -> Result<Resolved, String> {
        let mut findings = Vec::new();
        let classes = self.classes(&mut findings)?;
        let mut images = Vec::new();
        let mut listed = self.list_images(found, &mut images, &mut findings)?;
        let mut boxes = Boxes {
            of_category: classes.iter().map(|class| class.id).zip(0..).collect(),
            seen: HashMap::new(),
        };
        for (place, annotation) in self.annotations.iter().enumerate() {
            let (image, scale) = match annotation.image(&mut listed) {
                Ok(Some(leads_to)) => leads_to,
                Ok(None) => continue,
                Err(fault) => {
                    findings.push(annotation.finding(place, "", fault));
                    continue;
                }
            };
            let mut faults = Vec::new();
            match boxes.read(annotation, &images[image], scale, &mut faults) {
                Ok(object) => images[image].boxes.push(object),
                Err(fault) => faults.push(fault),
            }
            for fault in faults {
                findings.push(annotation.finding(place, &images[image].name, fault));
            }
        }
        join(&listed, &mut images);
        tell_full(&images, &mut findings);
        tell_left_out(listed, &mut findings);
        // Within a kind the order of the file stays.
        findings.sort_by_key(|finding| finding.kind);
        Ok(Resolved {
            images,
            classes,
            findings,
        })
    }

    /// The categories by id. Of those that share a name the ones without annotations are left out: tools add a
    /// category named after the project.
    fn classes(&self, findings: &mut Vec<Finding>) -> Result<Vec<Class>, String> {
        let mut classes = Vec::with_capacity(self.categories.len());
        for (place, category) in self.categories.iter().enumerate() {
            let id = whole(&category.id);
            let record = record("category", id, place);
            let id = id.ok_or_else(|| {
                format!(
                    "{record}: its id is {}; give it a whole number",
                    category.id
                )
            })?;
            match category.name.as_str().map(str::trim) {
                None | Some("") => return Err(format!("{record} has no name; give it one")),
                Some(name) => classes.push(Class {
                    id,
                    name: name.to_owned(),
                }),
            }
        }
        if classes.is_empty() {
            return Err("its list of categories is empty; name what the boxes show".into());
        }
        classes.sort_by_key(|class| class.id);
        classes.dedup();
        for pair in classes.windows(2) {
            if pair[0].id == pair[1].id {
                return Err(format!(
                    "category {} is called both `{}` and `{}`; give each name an id of its own",
                    pair[0].id, pair[0].name, pair[1].name
                ));
            }
        }
        let used: HashSet<u64> = self
            .annotations
            .iter()
            .filter_map(|annotation| whole(&annotation.category_id))
            .collect();
        let mut of_name: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for class in &classes {
            of_name
                .entry(class.name.clone())
                .or_default()
                .push(class.id);
        }
        for (name, ids) in of_name.into_iter().filter(|(_, ids)| ids.len() > 1) {
            let in_use: Vec<u64> = ids.iter().copied().filter(|id| used.contains(id)).collect();
            if let [first, second, ..] = in_use[..] {
                return Err(format!(
                    "categories {first} and {second} are both called `{name}`; merge them, or give each its own name"
                ));
            }
            let kept = in_use.first().copied().unwrap_or(ids[0]);
            for id in ids.into_iter().filter(|&id| id != kept) {
                classes.retain(|class| class.id != id);
                findings.push(Finding {
                    kind: Kind::CategoryTwice,
                    record: format!("category {id}"),
                    file: String::new(),
                    message: format!("it is called `{name}` as category {kept} is, and has no box"),
                });
            }
        }
        Ok(classes)
    }

    /// Where each image id leads; `images` gets those in use.
    fn list_images(
        &self,
        found: Vec<Result<Found, Fault>>,
        images: &mut Vec<AnnotatedImage>,
        findings: &mut Vec<Finding>,
    ) -> Result<BTreeMap<u64, Listed>, String> {
        let mut listed: BTreeMap<u64, Listed> = BTreeMap::new();
        // A picture that were two images could be trained on and held out.
        let mut of_picture: HashMap<usize, usize> = HashMap::new();
        for (place, (image, found)) in self.images.iter().zip(found).enumerate() {
            let id = whole(&image.id);
            let record = record("image", id, place);
            let name = image.file_name.as_str().filter(|name| !name.is_empty());
            let (Some(id), Some(name)) = (id, name) else {
                findings.push(Finding {
                    kind: Kind::ImageBroken,
                    record,
                    file: name.unwrap_or_default().to_owned(),
                    message: match id {
                        Some(_) => "it has no file_name; it is left out".to_owned(),
                        None => format!("its id is {}, no whole number", image.id),
                    },
                });
                continue;
            };
            if let Some(first) = listed.get(&id) {
                if first.name != name {
                    return Err(format!(
                        "image id {id} is given to both {} and {name}, whose boxes cannot be told apart; number the \
                         images and their annotations anew",
                        first.name
                    ));
                }
                findings.push(Finding {
                    kind: Kind::ImageTwice,
                    record,
                    file: name.to_owned(),
                    message: "it is there twice; the second is left out".to_owned(),
                });
                continue;
            }
            let scaled = found.and_then(|found| Ok((found, image.scale(found)?)));
            let place = match scaled {
                Err(fault) => Place::LeftOut(fault),
                Ok((found, scale)) => {
                    if scale != [1.0; 2] {
                        findings.push(Finding {
                            kind: Kind::ImageOfAnotherSize,
                            record: record.clone(),
                            file: name.to_owned(),
                            message: format!(
                                "stated as {}x{}, it is {}x{}",
                                image.width, image.height, found.width, found.height
                            ),
                        });
                    }
                    let number = *of_picture.entry(found.entry).or_insert(images.len());
                    match images.get(number) {
                        Some(first) => findings.push(Finding {
                            kind: Kind::ImageUnderTwoIds,
                            record,
                            file: name.to_owned(),
                            message: format!(
                                "it is the file of image {} too; both are one, with equal boxes once",
                                first.id
                            ),
                        }),
                        None => images.push(AnnotatedImage {
                            id,
                            name: name.to_owned(),
                            width: found.width,
                            height: found.height,
                            boxes: Vec::new(),
                            entry: found.entry,
                        }),
                    }
                    Place::Used(number, scale)
                }
            };
            let listing = Listed {
                name: name.to_owned(),
                place,
                lost: 0,
            };
            listed.insert(id, listing);
        }
        Ok(listed)
    }
}

impl ImageRecord {
    /// Pixels of the picture for a pixel that the annotations count, along x and y.
    fn scale(&self, found: Found) -> Result<[f64; 2], Fault> {
        let side = |value: &Value| value.as_f64().filter(|&side| side > 0.0);
        let (Some(width), Some(height)) = (side(&self.width), side(&self.height)) else {
            return Ok([1.0; 2]);
        };
        let (found_width, found_height) = (f64::from(found.width), f64::from(found.height));
        let scale = [found_width / width, found_height / height];
        // Whoever resized it rounded one side.
        let same_shape = (height * scale[0] - found_height).abs() <= 1.0
            || (width * scale[1] - found_width).abs() <= 1.0;
        if same_shape {
            return Ok(scale);
        }
        let cure = match [width, height] == [found_height, found_width] {
            true => {
                "pictures are turned upright as EXIF says: annotate it upright, or remove its EXIF orientation"
            }
            false => "annotate the picture as it is now, or restore the one that was annotated",
        };
        let message = format!(
            "stated as {}x{}, it is {}x{}; {cure}",
            self.width, self.height, found.width, found.height
        );
        Err((Kind::ImageOfAnotherShape, message))
    }
}

impl AnnotationRecord {
    fn finding(&self, place: usize, file: &str, (kind, message): Fault) -> Finding {
        Finding {
            kind,
            record: record("annotation", whole(&self.id), place),
            file: file.to_owned(),
            message,
        }
    }

    /// Number of its image and the scale of its boxes; nothing where the image is left out.
    fn image(
        &self,
        listed: &mut BTreeMap<u64, Listed>,
    ) -> Result<Option<(usize, [f64; 2])>, Fault> {
        let Some(id) = whole(&self.image_id) else {
            let message = format!("its image_id is {}, no whole number", self.image_id);
            return Err((Kind::AnnotationBroken, message));
        };
        match listed.get_mut(&id) {
            None => Err((Kind::ImageUnknown, format!("there is no image {id}"))),
            Some(listed) => match listed.place {
                Place::Used(image, scale) => Ok(Some((image, scale))),
                Place::LeftOut(_) => {
                    listed.lost += 1;
                    Ok(None)
                }
            },
        }
    }

    fn category(&self) -> Result<u64, Fault> {
        whole(&self.category_id).ok_or_else(|| {
            let message = format!("its category_id is {}, no whole number", self.category_id);
            (Kind::AnnotationBroken, message)
        })
    }

    fn corner_and_sides(&self) -> Result<[f64; 4], Fault> {
        let form = "it is [left, top, width, height]";
        let Some(numbers) = self.bbox.as_array() else {
            let message = format!("it has no bbox; {form}");
            return Err((Kind::AnnotationBroken, message));
        };
        let [left, top, width, height] = &numbers[..] else {
            let message = format!("its bbox has {} numbers; {form}", numbers.len());
            return Err((Kind::AnnotationBroken, message));
        };
        match [left, top, width, height].map(Value::as_f64) {
            [Some(left), Some(top), Some(width), Some(height)] => Ok([left, top, width, height]),
            _ => {
                let message = format!(
                    "its box {} has a side or corner that is no number",
                    self.bbox
                );
                Err((Kind::BoxBroken, message))
            }
        }
    }

    fn crowd(&self) -> Result<bool, Fault> {
        match &self.iscrowd {
            Value::Null => Ok(false),
            Value::Bool(crowd) => Ok(*crowd),
            number if number.as_f64() == Some(0.0) => Ok(false),
            number if number.as_f64() == Some(1.0) => Ok(true),
            other => {
                let message = format!("its iscrowd is {other}; it is 0 or 1");
                Err((Kind::AnnotationBroken, message))
            }
        }
    }
}

/// Reads the boxes of a document, in order.
struct Boxes {
    /// Number of the class of each category.
    of_category: HashMap<u64, usize>,
    /// Image, category and box of the annotation that has an id first.
    seen: HashMap<u64, (u64, u64, [u64; 4])>,
}

impl Boxes {
    /// The box of an annotation of `image`; `faults` gets what is wrong with it and does not keep it from being used.
    fn read(
        &mut self,
        annotation: &AnnotationRecord,
        image: &AnnotatedImage,
        scale: [f64; 2],
        faults: &mut Vec<Fault>,
    ) -> Result<TrueBox, Fault> {
        let category = annotation.category()?;
        let Some(&class) = self.of_category.get(&category) else {
            let message = format!("there is no category {category}");
            return Err((Kind::CategoryUnknown, message));
        };
        let stated = annotation.corner_and_sides()?;
        let crowd = annotation.crowd()?;
        let id = whole(&annotation.id);
        let this = (image.id, category, stated.map(f64::to_bits));
        if let Some(id) = id {
            match self.seen.entry(id) {
                Entry::Vacant(free) => {
                    free.insert(this);
                }
                Entry::Occupied(first) if *first.get() == this => {
                    let message = "it is there twice; the second is left out".to_owned();
                    return Err((Kind::AnnotationTwice, message));
                }
                Entry::Occupied(_) => {
                    let message = "another annotation has this id too; both are kept".to_owned();
                    faults.push((Kind::AnnotationTwice, message));
                }
            }
        }
        let [left, top, width, height] = stated;
        let [x, y] = scale;
        let whole_box = [left * x, top * y, width * x, height * y];
        let (bbox, clipped) = fit(whole_box, image.width, image.height)?;
        if clipped {
            let message = format!(
                "its box {whole_box:?} reaches beyond the {}x{} pixels of the image",
                image.width, image.height
            );
            faults.push((Kind::BoxClipped, message));
        }
        let whole = bbox[2] * bbox[3];
        let stated = annotation.area.as_f64().map(|area| area * x * y);
        let stated = stated.filter(|area| *area > 0.0 && area.is_finite());
        Ok(TrueBox {
            annotation: id,
            class,
            bbox,
            // What is stated may be that of a part that was clipped away.
            area: match stated {
                Some(area) if clipped => area.min(whole),
                Some(area) => area,
                None => whole,
            },
            crowd,
        })
    }
}

/// Leaves the second of equal boxes out of images that are listed under several ids.
fn join(listed: &BTreeMap<u64, Listed>, images: &mut [AnnotatedImage]) {
    let mut ids = vec![0; images.len()];
    for image in listed.values() {
        if let Place::Used(number, _) = image.place {
            ids[number] += 1;
        }
    }
    let joined = images.iter_mut().zip(ids).filter(|(_, ids)| *ids > 1);
    for (image, _) in joined {
        let mut seen = HashSet::new();
        image.boxes.retain(|object| {
            seen.insert((object.class, object.crowd, object.bbox.map(f64::to_bits)))
        });
    }
}

fn tell_full(images: &[AnnotatedImage], findings: &mut Vec<Finding>) {
    let full = images.iter().filter(|image| image.boxes.len() > MOST_BOXES);
    findings.extend(full.map(|image| Finding {
        kind: Kind::ManyBoxes,
        record: format!("image {}", image.id),
        file: image.name.clone(),
        message: format!(
            "it has {} boxes; AP looks at {MOST_BOXES} predictions of a class",
            image.boxes.len()
        ),
    }));
}

fn tell_left_out(listed: BTreeMap<u64, Listed>, findings: &mut Vec<Finding>) {
    for (id, image) in listed {
        if let Place::LeftOut(fault) = image.place {
            findings.push(left_out(id, image.name, fault, image.lost));
        }
    }
}

/// That an image is left out, and so many boxes with it.
pub(super) fn left_out(id: u64, name: String, (kind, reason): Fault, lost: usize) -> Finding {
    let boxes = match lost {
        0 => String::new(),
        1 => "; a box goes with it".to_owned(),
        lost => format!("; {lost} boxes go with it"),
    };
    Finding {
        kind,
        record: format!("image {id}"),
        file: name,
        message: format!("{reason}{boxes}"),
    }
}

/// A box within an image, and whether it had to be clipped for that by more than a rounding.
fn fit(bbox: [f64; 4], width: u32, height: u32) -> Result<([f64; 4], bool), Fault> {
    let [left, top, box_width, box_height] = bbox;
    if !bbox.iter().all(|number| number.is_finite()) {
        let message = format!("its box {bbox:?} has a side or corner that is no finite number");
        return Err((Kind::BoxBroken, message));
    }
    if box_width < ROUNDING || box_height < ROUNDING {
        let message = format!("its box {bbox:?} has a side that is not above 0");
        return Err((Kind::BoxBroken, message));
    }
    let (right, bottom) = (left + box_width, top + box_height);
    let (picture_right, picture_bottom) = (f64::from(width), f64::from(height));
    if left >= 0.0 && top >= 0.0 && right <= picture_right && bottom <= picture_bottom {
        return Ok((bbox, false));
    }
    let (inner_left, inner_top) = (left.max(0.0), top.max(0.0));
    let inner = [
        inner_left,
        inner_top,
        right.min(picture_right) - inner_left,
        bottom.min(picture_bottom) - inner_top,
    ];
    let least = |side: f64| (side.min(1.0) - ROUNDING).max(ROUNDING);
    if inner[2] < least(box_width) || inner[3] < least(box_height) {
        let message =
            format!("its box {bbox:?} lies beyond the {width}x{height} pixels of the image");
        return Err((Kind::BoxOutside, message));
    }
    let reach = [-left, -top, right - picture_right, bottom - picture_bottom];
    Ok((inner, reach.iter().any(|&beyond| beyond > ROUNDING)))
}

impl AnnotatedImage {
    /// What is to be found: its boxes without crowds.
    pub fn objects(&self) -> impl Iterator<Item = &TrueBox> {
        self.boxes.iter().filter(|object| !object.crowd)
    }
}

/// The findings by kind, the first few of each, a line each.
pub fn describe(findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    for same in findings.chunk_by(|a, b| a.kind == b.kind) {
        lines.push(format!("{}: {}", same[0].kind.title(), same.len()));
        let shown = same.iter().take(LISTED);
        lines.extend(shown.map(|finding| format!("  {finding}")));
        if same.len() > LISTED {
            lines.push(format!("  … and {} more", same.len() - LISTED));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"{"info": {"year": 2026}, "images": [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 2.0, "file_name": "b/c.png", "width": 32, "height": 24},
        {"id": 3, "file_name": "d.png"}],
        "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2.5, 30, 40], "area": 900, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [-4, 0, 90, 9e1], "iscrowd": true},
        {"id": 3, "image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4]]},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [0, 0, NaN, -Infinity], "caption": "a \"NaN\""}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "pet"}]}"#;

    #[test]
    fn mutated_annotations_are_read_or_refused() {
        let corpus = [
            WHOLE.as_bytes().to_vec(),
            br#"{"images": [], "annotations": [], "categories": []}"#.to_vec(),
        ];
        let found = |entry: usize| Found {
            entry,
            width: 64,
            height: 48,
        };
        crate::fuzz::survives(&corpus, 20_000, |bytes| {
            let Ok(document) = Document::parse(bytes) else {
                return;
            };
            let images = 0..document.images.len();
            let found = images.map(|entry| Ok(found(entry))).collect();
            let Ok(Resolved {
                images, classes, ..
            }) = document.resolve(found)
            else {
                return;
            };
            for object in images.iter().flat_map(|image| &image.boxes) {
                let [left, top, width, height] = object.bbox;
                assert!(left >= 0.0 && top >= 0.0 && width > 0.0 && height > 0.0);
                assert!(left + width <= 64.0 + 1e-6 && top + height <= 48.0 + 1e-6);
                assert!(object.area > 0.0 && object.area.is_finite());
                assert!(object.class < classes.len());
            }
        });
    }

    #[test]
    fn words_for_nan_are_null_except_in_texts() {
        let clean = without_nan(br#"[NaN, -Infinity, Infinity, "NaN \" NaN", -1]"#);
        assert_eq!(clean, br#"[null, null, null, "NaN \" NaN", -1]"#);
        let document = Document::parse(WHOLE.as_bytes()).unwrap();
        assert_eq!(document.annotations[3].bbox[2], Value::Null);
    }
}
