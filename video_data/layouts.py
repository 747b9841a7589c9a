"""What belongs in the folder of each dataset; printed when the folder is missing or empty."""

LAYOUTS = {
    "msvd": """\
MSVD (Microsoft Research Video Description Corpus): 1,970 short clips. Put into the folder that --data names:

    YouTubeClips/               the clips, ID.avi (or .mp4; vidN.avi with youtube_mapping.txt), 1.7 GB
    AllVideoDescriptions.txt    the captions; or raw-captions.pkl, or MSR_Video_Description_Corpus.csv
    youtube_mapping.txt         or train_list.txt, val_list.txt, test_list.txt; not needed with captions of all clips

Subfolders are searched too. docs/datasets.md lists where each file is published.""",
    "msrvtt": """\
MSR-VTT: 10,000 clips with 20 captions each. Put into the folder that --data names:

    TrainValVideo/, TestVideo/    the clips, videoN.mp4, in these folders or in one, 6 GB
    MSRVTT_data.json              captions and splits; or train_val_videodatainfo.json and test_videodatainfo.json

Subfolders are searched too. docs/datasets.md lists where each file is published.""",
    "folder": """\
Your own clips. Put into the folder that --data names the videos and a file captions.json with paths relative to it:

    {"train": {"a.mp4": ["a man opens a door", "someone comes in"], "more/b.mov": ["a dog barks"]},
     "val": {"c.mp4": ["a cat sleeps"]},
     "test": {"d.mp4": ["a child paints"]}}

val chooses the best weights. test is scored once, at the end.""",
}
